"""Bad input ends a program with one sentence, and so does a place that cannot be written."""

import json

import pytest

from jaxformer.errors import InputError
from jaxformer.program import entry, write_json, writing


def test_bad_input_is_one_sentence_and_status_2(capsys):
    @entry
    def main(argv=None):
        if argv:
            raise InputError(f"{argv[0]}: is no number; name one")
        return 1

    assert main() == 1
    assert main(["x"]) == 2
    assert capsys.readouterr() == ("", "error: x: is no number; name one\n")


def test_what_is_no_bad_input_stays_a_fault():
    @entry
    def main():
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="disk"):
        main()


def test_results_go_below_new_folders_and_a_file_in_the_way_is_told(tmp_path):
    write_json(tmp_path / "a" / "b.json", {"x": 1})
    assert json.loads((tmp_path / "a" / "b.json").read_text()) == {"x": 1}
    with pytest.raises(InputError, match=r"b\.json.*name another place to write to"):
        write_json(tmp_path / "a" / "b.json" / "c.json", {})
    with pytest.raises(InputError, match="another place"), writing():
        raise PermissionError(13, "no", "x.png")
