"""What is secret, by one rule."""

from __future__ import annotations

import pytest

from pool_managerd.core.redaction import (
    MASK,
    Redactor,
    is_secret_variable,
    masked_argv,
    masked_env,
    masked_text,
    named_secrets,
    secrets_in,
)
from pool_managerd.errors import EngineError


@pytest.mark.parametrize(
    "name",
    ["HF_TOKEN", "SIGNING_KEY", "DB_PASS", "PGPASS", "PGPASSWORD", "OPENAI_KEY", "AWS_ACCESS_KEY_ID", "DATABASE_URL", "X", "FOO",
     "NVIDIA_API_KEY", "VLLM_API_KEY", "LLAMA_ARG_API_KEY", "LLAMA_API_KEY", "CUDA_SECRET", "SENTRY_DSN", "home", "NGC_CLI"],
)  # fmt: skip
def test_a_variable_is_secret_unless_its_name_is_known_to_be_harmless(name: str) -> None:
    assert is_secret_variable(name)
    assert masked_env({name: "value-of-it"}) == {name: MASK}


@pytest.mark.parametrize(
    "name", ["CUDA_VISIBLE_DEVICES", "LLAMA_ARG_CTX_SIZE", "OMP_NUM_THREADS", "HOME", "PATH", "LANG", "LC_ALL", "HF_HUB_OFFLINE",
             "TOKENIZERS_PARALLELISM", "NCCL_DEBUG"]
)  # fmt: skip
def test_a_variable_that_everybody_knows_is_shown(name: str) -> None:
    assert masked_env({name: "1"}) == {name: "1"}


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        (("--api-key", "abc"), ["--api-key", MASK]),
        (("--api-key", "-abc"), ["--api-key", MASK]),
        (("--api-key=abc", "--port", "1"), [f"--api-key={MASK}", "--port", "1"]),
        (("--api_key", "a", "b", "--port", "1"), ["--api_key", MASK, MASK, "--port", "1"]),
        (("--hf-token", "x", "-c", "1"), ["--hf-token", MASK, "-c", "1"]),
        (("-hft", "x"), ["-hft", MASK]),
        (("--api-key-file", "/k", "--ssl-key-file", "/s"), ["--api-key-file", "/k", "--ssl-key-file", "/s"]),
        (("--max-tokens", "5", "--cache-type-k", "q8_0"), ["--max-tokens", "5", "--cache-type-k", "q8_0"]),
        (("--download", "https://u:p4ss@h/x?token=abc&b=1"), ["--download", f"https://{MASK}@h/x?token={MASK}&b=1"]),
        (("-e", "HF_TOKEN=abc", "--password=x"), ["-e", f"HF_TOKEN={MASK}", f"--password={MASK}"]),
        (("--header", "Authorization: Bearer abcdefg"), ["--header", f"Authorization: Bearer {MASK}"]),
    ],
)
def test_a_command_line_is_shown_without_what_follows_a_secret_flag(argv: tuple[str, ...], shown: list[str]) -> None:
    assert masked_argv(argv) == shown


def test_a_url_is_shown_without_userinfo_and_secret_parameters() -> None:
    text = "cannot fetch https://user:pw@h:1/a?X-Amz-Signature=0abc&x=1#f and postgres://u:p@db/x"
    assert masked_text(text) == f"cannot fetch https://{MASK}@h:1/a?X-Amz-Signature={MASK}&x=1#f and postgres://{MASK}@db/x"


def test_every_secret_value_of_an_engine_is_known() -> None:
    env = {"DB_URL": "postgres://u:pass-word@h/", "PATH": "/bin", "MULTI": "line-one\nline-two"}
    found = secrets_in(env, ("--api-key", "key-one,key-two", "--token=tok-three", "--url=http://usr:pw-four@h"))
    redactor = Redactor(found)
    text = "line-two key-one key-two tok-three pass-word pw-four /bin"
    assert redactor.text(text) == f"{MASK} {MASK} {MASK} {MASK} {MASK} {MASK} /bin"


def test_a_secret_that_holds_another_one_is_masked_whole_and_what_is_forgotten_is_not() -> None:
    redactor = Redactor()
    redactor.know("a", ["secret-value", "secret-value-longer", "short", "123456", "enabled"])
    redactor.know("b", ["other-secret"])
    assert redactor.text("secret-value-longer short 123456 enabled other-secret") == f"{MASK} short 123456 enabled {MASK}"
    redactor.know("a", ())
    assert redactor.text("secret-value other-secret") == f"secret-value {MASK}"


def test_the_lines_of_a_value_are_secret_and_its_indentation_and_ruled_lines_are_not() -> None:
    redactor = Redactor(
        secrets_in({"CREDENTIALS": "{\n        \n----------\n    'id': 'the-secret-id'\n}", "PASSPHRASE": "!$%&/()="})
    )
    told = "a table:\n        column\n----------\n 'id': 'the-secret-id' !$%&/()="
    assert redactor.text(told) == f"a table:\n        column\n----------\n {MASK} {MASK}"


def test_what_names_a_thing_is_left_alone_and_an_error_is_redacted_throughout() -> None:
    redactor = Redactor(["qwen-model", "the-secret"])
    fields = redactor.mapping(
        {"pool_id": "qwen-model", "model_id": "qwen-model", "text": "qwen-model", "log_tail": ["the-secret"]}
    )
    assert fields == {"pool_id": "qwen-model", "model_id": "qwen-model", "text": MASK, "log_tail": [MASK]}
    error = redactor.error(EngineError("it said the-secret", hint="not the-secret", details={"log_tail": ["the-secret"]}))
    assert (error.message, str(error), error.hint, error.details) == (
        f"it said {MASK}", f"it said {MASK}", f"not {MASK}", {"log_tail": [MASK]},
    )  # fmt: skip


def test_what_is_secret_of_an_engine_is_named_and_not_shown() -> None:
    env = {"HF_TOKEN": "x", "PATH": "/bin", "API_KEY": "y"}
    argv = ("run", "--api-key", "a", "b", "--port", "1", "--token=t", "--url", "https://u:p4ss@h", "--api-key", "c")
    assert named_secrets(env, argv) == ["API_KEY", "HF_TOKEN", "--api-key", "--token", "an argument"]
    assert named_secrets({}, ("run", "--port", "1")) == []


def test_the_secrets_of_one_owner_are_told_by_their_owner_alone() -> None:
    redactor = Redactor()
    redactor.know("a", ["secret-2", "secret-1", "secret-3"])
    redactor.know("b", ["secret-0"])
    assert redactor.known("a", 2) == ["secret-1", "secret-2"] and redactor.known("c", 2) == []


def test_a_userinfo_without_a_password_is_secret_as_a_whole_and_one_with_colons_from_the_first() -> None:
    assert secrets_in({"LANG": "http://user:pa:ss@h"}) == {"user:pa:ss", "pa:ss"}
    assert "only-a-user" in secrets_in({}, ("--url=http://only-a-user@h",))


@pytest.mark.parametrize(
    ("secret", "masked"),
    [("abcabc", True), ("ababab", False), ("abcde", False), ("1234567", False), ("12345678", True), ("1.2.345", True),
     ("123.45", False), ("  abc   ", False), ("enabled", False)],
)  # fmt: skip
def test_only_what_tells_more_than_a_word_or_a_figure_is_masked(secret: str, masked: bool) -> None:
    assert (Redactor([secret]).text(f"<{secret}>") == f"<{MASK}>") is masked


def test_nothing_deeper_than_eight_levels_is_told_and_numbers_under_secret_names_are() -> None:
    deep: object = "end"
    for _ in range(7):
        deep = [deep]
    assert Redactor().mapping({"a": deep}) == {"a": deep}
    assert "end" not in str(Redactor().mapping({"a": [[deep]]}))
    nested: dict[str, object] = {"n": "end"}
    for _ in range(8):
        nested = {"n": nested}
    assert Redactor().mapping(nested) == nested
    assert "end" not in str(Redactor().mapping({"n": nested}))
    assert Redactor().mapping({"token": 5, "api_key": True, "password": None}) == {"token": 5, "api_key": True, "password": None}
    assert Redactor().mapping({"token": ["x"], "token_file": "/x"}) == {"token": MASK, "token_file": "/x"}


def test_a_number_that_json_has_not_is_told_as_text_wherever_it_stands() -> None:
    nan = float("nan")
    assert Redactor().mapping({"a": nan, "b": [nan, 1.5], "c": {"d": -float("inf")}}) == {
        "a": "nan",
        "b": ["nan", 1.5],
        "c": {"d": "-inf"},
    }
