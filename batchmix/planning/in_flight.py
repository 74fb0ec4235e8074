"""The prompts that the engine has: given to it and not completed yet."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from batchmix.records import Batch, Completion, Prompt


class InFlight:
    """Lets batches through as long as their prompts have at most `max_bytes`; one that is larger goes alone."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._missing: dict[int, int] = {}  # by the prompt's identity: samples that have not come
        self.bytes = 0
        self.peak_bytes = 0

    def admit(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches, and one without prompts for each time that the engine asks too early.

        Whoever runs a slice of the model sees the same batches, so that all of them wait alike.
        """
        for batch in batches:
            size = sum(prompt.num_bytes for prompt in batch.prompts)
            while self._missing and self.bytes + size > self._max_bytes:
                yield Batch([])
            for prompt in batch.prompts:
                self._missing[id(prompt)] = 1 if prompt.error is not None else prompt.num_samples
            self.bytes += size
            self.peak_bytes = max(self.peak_bytes, self.bytes)
            yield batch

    def completed(self, completion: Completion) -> None:
        """A sample of a prompt has come out of the engine."""
        prompt: Prompt = completion.prompt
        missing = self._missing.pop(id(prompt)) - 1
        if missing:
            self._missing[id(prompt)] = missing
        else:
            self.bytes -= prompt.num_bytes
