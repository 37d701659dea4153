"""Texts as a source of documents."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Texts:
    texts: tuple[str, ...]

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, index):
        return {"text": self.texts[index], "source": f"text {index}"}
