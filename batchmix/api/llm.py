"""`LLM`: vLLM's class for a script or a notebook, over the same stages and engine as a job."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any, overload

from batchmix.api import names
from batchmix.api.arguments import job_config
from batchmix.api.failed_prompts import failed_prompts
from batchmix.api.outputs import RequestOutput, request_output
from batchmix.api.progress import UseTqdm, progress_bar
from batchmix.api.requests import as_conversations, as_prompts, chat_row, prompt_row
from batchmix.api.sampling_params import SamplingParams, python_names
from batchmix.api.session import EngineSession
from batchmix.api.tokenizer import LLMTokenizer
from batchmix.checkpoints.checkpoint import open_checkpoint
from batchmix.engine.build import check_engine
from batchmix.engine.device import check_places
from batchmix.errors import BatchmixError
from batchmix.models.config_keys import GENERATION_CONFIG
from batchmix.models.tensor_parallel import TensorParallel
from batchmix.output.detokenize import detokenize
from batchmix.prompts.tokenizer import load_tokenizer
from batchmix.records import InputRow
from batchmix.stages import Prompts
from batchmix.templates.chat_template import TemplateOptions, read_chat_template
from batchmix.templates.messages import PromptError

_log = logging.getLogger(__name__)
MakeRow = Callable[[int, Any, Mapping[str, Any]], tuple[InputRow, str | None]]
_DEFAULTS = {"repetition_penalty": "repetition_penalty", "temperature": "temperature", "top_k": "top_k",
             "top_p": "top_p", "min_p": "min_p", "max_new_tokens": "max_tokens"}  # fmt: skip


class LLM:
    """A model that is loaded once and answers prompts, as many as there are, in batches.

    One call runs at a time. `with LLM(...) as llm:` gives the memory back at the end of the block, as `close` does.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        tokenizer: str | None = None,
        dtype: str = "auto",
        quantization: str | None = None,
        kv_cache_dtype: str = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        gpu_memory_utilization: float = 0.9,
        tensor_parallel_size: int = 1,
        revision: str | None = None,
        chat_template: str | os.PathLike[str] | None = None,
        seed: int | None = 0,
        generation_config: str = "auto",
        enforce_eager: bool = False,
        enable_prefix_caching: bool | None = None,
        **others: Any,
    ) -> None:
        """Load `model`: a folder, a hub id, or "tiny" for the built-in model.

        `seed`: of calls whose parameters have none. `generation_config`: "auto" takes the defaults of sampling parameters from
        the model folder, "vllm" does not. TypeError for an argument that is not there, with what to use instead; ValueError
        for a wrong value; BatchmixError for what is wrong with the model or the machine.
        """
        if tokenizer is not None and os.fspath(tokenizer) != os.fspath(model):
            raise TypeError("LLM: tokenizer is not there; the tokenizer is the model folder's")
        if generation_config not in ("auto", "vllm"):
            raise ValueError(f"generation_config={generation_config!r}: must be auto or vllm; use SamplingParams")
        if enforce_eager:
            others.setdefault("cuda_graphs", False)
        if enable_prefix_caching is not None:
            others.setdefault("share_prefix", enable_prefix_caching)
        given = {
            "dtype": dtype, "quantization": quantization, "kv_cache_dtype": kv_cache_dtype,
            "max_model_len": max_model_len, "max_num_seqs": max_num_seqs,
            "max_num_batched_tokens": max_num_batched_tokens, "gpu_memory_utilization": gpu_memory_utilization,
            "tensor_parallel_size": tensor_parallel_size, "revision": revision, "chat_template": chat_template,
        }  # fmt: skip
        self._config = config = read_chat_template(job_config(model, given | others))
        self._seed, self._calls = seed or 0, 0
        self._model_defaults = generation_config == "auto"
        check_places(config.engine, tensor_parallel_size)
        self._checkpoint = checkpoint = open_checkpoint(config.model)
        for note in checkpoint.notes:
            if not note.startswith(GENERATION_CONFIG.file):  # whose settings are used here
                _log.warning("%s", note)
        check_engine(checkpoint, config.engine)
        TensorParallel(size=tensor_parallel_size).check(checkpoint.config, checkpoint.quantization)
        self._stage = Prompts.open(config, checkpoint)
        self._stages: dict[str, Prompts] = {}  # by chat template
        self._session = EngineSession(config, checkpoint, self._stage)

    @overload
    def generate(
        self, prompts: Iterator[Any], sampling_params: Any = ..., *, use_tqdm: UseTqdm = ..., **others: Any
    ) -> Generator[RequestOutput, None, None]: ...

    @overload
    def generate(
        self, prompts: Any, sampling_params: Any = ..., *, use_tqdm: UseTqdm = ..., **others: Any
    ) -> list[RequestOutput]: ...

    def generate(
        self,
        prompts: Any = None,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: UseTqdm = True,
        **others: Any,
    ) -> list[RequestOutput] | Generator[RequestOutput, None, None]:
        """Answer prompts: a text, token ids, `{"prompt": ...}`, `{"prompt_token_ids": ...}`, or several of them.

        Texts are never put into a chat template; `chat` does that. Returns the outputs in the order of the prompts. Given an
        iterator (a generator, a file), it returns one that gives outputs in the order of completion; a thread reads the prompts
        ahead, by no more than are sorted together (`sort_window`) and a few thousand.

        A prompt that cannot be run comes back with `finish_reason` "error", and a warning counts these at the end. ValueError or TypeError for parameters that
        cannot work, before anything runs; KeyboardInterrupt on Ctrl-C, after which the LLM can be used as before.
        """
        names.refuse("generate", others, names.CALL, ["prompts", "sampling_params", "use_tqdm"])
        return self._answer(prompts, as_prompts, prompt_row, sampling_params, self._stage, use_tqdm)

    @overload
    def chat(
        self, messages: Iterator[Any], sampling_params: Any = ..., use_tqdm: UseTqdm = ..., **others: Any
    ) -> Generator[RequestOutput, None, None]: ...

    @overload
    def chat(
        self, messages: Any, sampling_params: Any = ..., use_tqdm: UseTqdm = ..., **others: Any
    ) -> list[RequestOutput]: ...

    def chat(
        self,
        messages: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: UseTqdm = True,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **others: Any,
    ) -> list[RequestOutput] | Generator[RequestOutput, None, None]:
        """Answer a conversation, a list of `{"role": ..., "content": ...}`, or several, rendered as a job renders them.

        `chat_template`: Jinja or a file of it; None for the model's. `continue_final_message`: the answer goes on where the
        assistant's last message ends. `tools` and `chat_template_kwargs` are for the template. Otherwise as `generate`.
        """
        names.refuse("chat", others, names.CALL, ["messages", "sampling_params", "use_tqdm", "chat_template", "tools"])
        if continue_final_message and add_generation_prompt:
            raise ValueError("chat: with continue_final_message=True give add_generation_prompt=False")
        options = TemplateOptions(
            add_generation_prompt or continue_final_message, list(tools) if tools else None, chat_template_kwargs or {}
        )
        stage = self._chat_stage(chat_template, options)

        def make_row(number: int, conversation: Any, sampling: Mapping[str, Any]) -> tuple[InputRow, str | None]:
            return chat_row(number, conversation, sampling, continue_final_message)

        return self._answer(messages, as_conversations, make_row, sampling_params, stage, use_tqdm, rendered=True)

    def get_tokenizer(self) -> LLMTokenizer:
        """ValueError where the model folder has no tokenizer."""
        if self._stage.tokenizer is None:
            raise ValueError(f"{self._checkpoint.folder} has no tokenizer; prompts are token ids")
        return LLMTokenizer(self._stage.tokenizer)

    def get_default_sampling_params(self) -> SamplingParams:
        """Those of calls without: vLLM's defaults, and what generation_config.json of the model folder says otherwise."""
        given = self._checkpoint.generation_config if self._model_defaults else {}
        changed = {key: value for key, value in given.items() if value != GENERATION_CONFIG.settings.get(key)}
        return SamplingParams(**{ours: changed[key] for key, ours in _DEFAULTS.items() if changed.get(key) is not None})

    def close(self) -> None:
        """Give the memory back. What is under way ends; the LLM cannot be used again."""
        self._session.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getattr__(self, name: str) -> Any:
        if name in names.METHODS:
            raise AttributeError(f"LLM.{name} is not there; {names.METHODS[name]}")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    # One call.

    def _answer(
        self, prompts: Any, as_list: Callable[[Any], list[Any]], make_row: MakeRow, sampling_params: Any, stage: Prompts,
        use_tqdm: UseTqdm, rendered: bool = False,
    ) -> list[RequestOutput] | Generator[RequestOutput, None, None]:  # fmt: skip
        """`rendered`: prompts have no texts of their own, but those that a template makes."""
        self._session.check_open()
        if not isinstance(sampling_params, SamplingParams | Sequence | None) or isinstance(sampling_params, str):
            raise _not_params(sampling_params)
        seed = self._next_seed()
        if isinstance(prompts, Iterator):
            if sampling_params is not None and not isinstance(sampling_params, SamplingParams):
                raise TypeError("sampling_params: for an iterator of prompts give one SamplingParams for all")
            [overrides] = self._overrides([sampling_params], seed, stage)
            found = (make_row(number, prompt, overrides) for number, prompt in enumerate(prompts))
            return self._outputs(found, None, stage, use_tqdm, rendered)
        given = as_list(prompts)
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params] * len(given)
        elif len(sampling_params) != len(given):
            raise ValueError(
                f"sampling_params: {len(sampling_params)} for {len(given)} prompts; give as many, or one for all"
            )
        rows = map(make_row, range(len(given)), given, self._overrides(sampling_params, seed, stage))
        outputs = dict[str, RequestOutput]()
        with closing(self._outputs(rows, len(given), stage, use_tqdm, rendered)) as answers:
            outputs |= {output.request_id: output for output in answers}
        return [outputs[str(number)] for number in range(len(given))]

    def _outputs(
        self, rows: Iterator[tuple[InputRow, str | None]], total: int | None, stage: Prompts, use_tqdm: UseTqdm,
        rendered: bool,
    ) -> Generator[RequestOutput, None, None]:  # fmt: skip
        """The outputs of rows, each with the text of its prompt, in the order of completion."""
        texts: dict[int, str | None] = {}  # of prompts on their way

        def noted() -> Iterator[InputRow]:
            for row, text in rows:
                texts[row.row] = text
                yield row

        with (
            failed_prompts() as failed,
            closing(self._session.run(noted(), stage)) as found,
            progress_bar(use_tqdm, total) as count,
        ):
            for samples in found:
                detokenize(samples, stage.tokenizer)
                prompt, text = samples[0].prompt, texts.pop(samples[0].prompt.row)
                if rendered and prompt.token_ids and stage.tokenizer is not None:
                    [text] = stage.tokenizer.decode([prompt.token_ids], False)
                output = request_output(samples, text, stage.tokenizer)
                count(output)
                failed.count(samples, output)
                yield output
        self._session.check_open()  # it was closed meanwhile, before all prompts were answered

    def _next_seed(self) -> int:
        """Of the parameters of this call that have none: another one in each call, and the same in each run of a script."""
        self._calls += 1
        digest = hashlib.blake2b(f"{self._seed}/{self._calls}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1

    def _overrides(self, params: Iterable[SamplingParams | None], seed: int, stage: Prompts) -> list[Mapping[str, Any]]:
        """These as overrides of `sampling`, one object for all that are alike. ValueError where no prompt can run with
        them."""
        default = self.get_default_sampling_params()
        known: dict[int, Mapping[str, Any]] = {}  # by identity
        alike: dict[str, Mapping[str, Any]] = {}
        found = []
        for one in params:
            one = default if one is None else one
            if not isinstance(one, SamplingParams):
                raise _not_params(one)
            if id(one) not in known:
                one.check()  # its attributes may have been changed
                overrides = one.overrides(seed, self._checkpoint.max_model_len)
                if repr(overrides) not in alike:
                    self._check(overrides, stage)
                known[id(one)] = alike.setdefault(repr(overrides), overrides)
            found.append(known[id(one)])
        return found

    def _check(self, overrides: Mapping[str, Any], stage: Prompts) -> None:
        try:
            stage.builder.check_sampling(overrides)
        except PromptError as error:
            raise ValueError(python_names(str(error))) from None
        except RecursionError:
            raise ValueError("structured_outputs: the schema is nested too deeply") from None

    def _chat_stage(self, chat_template: str | None, options: TemplateOptions) -> Prompts:
        """What renders conversations. ValueError where there is no template, or it does not read the options."""
        config, stage = self._config, self._stage
        try:
            if chat_template is not None:
                config = read_chat_template(replace(config, data=replace(config.data, chat_template=chat_template)))
                key = config.data.chat_template
                if key not in self._stages:
                    tokenizer = load_tokenizer(self._checkpoint.folder, key)
                    self._stages[key] = Prompts.of(config, self._checkpoint, tokenizer, stage.grammars)
                stage = self._stages[key]
            if stage.tokenizer is None:
                raise BatchmixError(f"chat: {self._checkpoint.folder} has no tokenizer; give token ids to generate")
            if not stage.tokenizer.chat_format.chats:
                raise BatchmixError(
                    f"chat: there is no chat template ({stage.tokenizer.chat_format.name}); give chat_template"
                )
            if options == TemplateOptions():
                return stage
            tokenizer = stage.tokenizer.with_options(options)
            return Prompts.of(config, self._checkpoint, tokenizer, stage.grammars)
        except BatchmixError as error:
            raise ValueError(str(error)) from None


def _not_params(given: Any) -> TypeError:
    remedy = "; use SamplingParams(**...)" if isinstance(given, Mapping) else ""
    return TypeError(f"sampling_params: must be SamplingParams, not {type(given).__name__}{remedy}")
