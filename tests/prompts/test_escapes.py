from __future__ import annotations

import pytest

from batchmix.annotate.config import AnnotateConfig
from batchmix.config import Config
from batchmix.input.config import DataConfig
from batchmix.prompts.escapes import warn_of_escapes
from batchmix.sampling import SamplingConfig


def warnings(caplog: pytest.LogCaptureFixture, config: Config) -> list[str]:
    caplog.clear()
    warn_of_escapes(config)
    return caplog.messages


def test_a_backslash_and_an_n_are_no_newline(caplog: pytest.LogCaptureFixture) -> None:
    (line,) = warnings(caplog, Config(sampling=SamplingConfig(stop=["x", r"\n\n"])))
    assert line == (
        r"sampling.stop holds \n, a backslash and an n, which is no newline; for a newline write"
        r""" $'sampling.stop=["\n"]' in bash or "\n" in double quotes in a YAML file"""
    )
    found = warnings(caplog, Config(data=DataConfig("p", template=r"{{ a }}\nAnswer:", system_prompt=r"a\t b")))
    assert [line.partition(",")[0] for line in found] == [r"data.system_prompt holds \t", r"data.template holds \n"]
    task = AnnotateConfig(input="{{ a }}", instruction=r"Do.\nThis")
    assert warnings(caplog, Config(annotate=task))[0].startswith(r"annotate.instruction holds \n")


@pytest.mark.parametrize(
    "text", ["a\nb", r"\nabla f \neq \text{x} \right\nu", "{{ '\\n'.join(row.names) }}", "C:/new", ""]
)
def test_other_texts_are_left_alone(caplog: pytest.LogCaptureFixture, text: str) -> None:
    assert not warnings(
        caplog, Config(data=DataConfig("p", template=text or None), sampling=SamplingConfig(stop=["\n"]))
    )
