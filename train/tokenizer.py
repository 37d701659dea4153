"""`python -m train.tokenizer learn|write CORPUS ...`: a tokenizer from texts, and shards by it.

    python -m train.tokenizer learn stdlib --vocab 4096 --out runs/code.json
    python -m train.tokenizer write 'books/*.txt' --tokenizer runs/code.json --out books.npy

A corpus is `stdlib`, the training split of Python's own library, or files by their suffix:
JSON Lines, Parquet, and text for all others. A pattern is put in quotes.
"""

import argparse
import pathlib
import sys

from jaxformer.data.corpus import JsonLines, Stdlib, TextFiles
from jaxformer.data.shards import ParquetText
from jaxformer.data.tokenizer import BEGIN, END, Bytes, TokenizerFile, learn
from jaxformer.data.tokens import Shards, write_shard
from jaxformer.program import entry, writing


def corpus(name: str, field: str = "text") -> Stdlib | JsonLines | ParquetText | TextFiles:
    """The documents that a name stands for, see the module; `field` is that of the text."""
    if name == "stdlib":
        return Stdlib("train")
    suffix = pathlib.PurePath(name).suffix
    if suffix in (".jsonl", ".ndjson"):
        return JsonLines(name, field)
    return ParquetText(name, field) if suffix == ".parquet" else TextFiles(name)


@entry
def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m train.tokenizer",
        description="Learns byte pairs from texts, or writes texts as token shards.",
    )
    parser.add_argument("action", choices=("learn", "write"))
    parser.add_argument("corpus", help="stdlib, a file, or a pattern in quotes")
    parser.add_argument("--out", required=True, help="a .json to learn, a .npy to write")
    parser.add_argument("--field", default="text", help="of JSON Lines and Parquet")
    parser.add_argument("--vocab", type=int, default=4096, help="ids to learn, in all")
    parser.add_argument("--tokenizer", help="a tokenizer.json to write by; default: bytes")
    parser.add_argument("--begin", help=f"its token before a text, such as {BEGIN}")
    parser.add_argument("--end", default=END, help="its token after a text")
    args = parser.parse_args(argv)
    texts = corpus(args.corpus, args.field)
    with writing():
        pathlib.Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    if args.action == "learn":
        learned = learn(texts, args.vocab)
        with writing():
            learned.save(args.out)
        print(f"{args.out}: {args.vocab} ids from {len(texts)} documents")
        return 0
    tokenizer = Bytes()
    if args.tokenizer is not None:
        tokenizer = TokenizerFile(args.tokenizer, args.begin, args.end)
    with writing():
        count = write_shard(args.out, texts, tokenizer)
    part = Shards(args.out, tokenizer.vocab).parts[0]
    print(f"{args.out}: {count:,} tokens of {len(part.ends):,} documents")
    return 0


if __name__ == "__main__":
    sys.exit(main())
