"""OpenAI's own Python client against a running gateway: `pip install openai`, nothing of this project's code.

usage: openai_client.py BASE_URL [PROMPT]      (http://127.0.0.1:7780/v1, as `unmask up` prints it)
Fails with what is not as OpenAI's interface has it; prints one JSON object with what it saw.
"""

import json
import sys

import openai

PROMPT = "def sum_of_squares(numbers):\n"


def check(ok: bool, what: str) -> None:
    if not ok:
        raise SystemExit(f"not as expected: {what}")


def refused(kind: type, call, *parts: str) -> dict:
    """What a call is refused with: by class, and with these parts in its message."""
    try:
        call()
    except openai.APIStatusError as error:
        check(type(error) is kind, f"{type(error).__name__} instead of {kind.__name__}: {error}")
        check(all(part in error.message for part in parts), f"{parts} in {error.message}")
        return {"class": type(error).__name__, "status": error.status_code, "param": error.param, "code": error.code}
    raise SystemExit(f"not refused: {parts}")


def completion(client: openai.OpenAI, model: str, able: bool, prompt: str) -> dict:
    """Whole, streamed, stopped and cut; `able`: the model decodes autoregressively too."""
    wanted = {"model": model, "prompt": prompt, "max_tokens": 48, "seed": 1, "temperature": 0}
    whole = client.completions.create(**wanted)
    check(whole.object == "text_completion" and whole.choices[0].finish_reason in ("stop", "length"), str(whole))
    check(whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens, str(whole.usage))

    text, last, usage, drafts = "", None, None, 0
    options = {"stream": True, "stream_options": {"include_usage": True}, "extra_body": {"unmask": {"drafts": True}}}
    for chunk in client.completions.create(**wanted, **options):
        if not chunk.choices:
            usage = chunk.usage
            continue
        text += chunk.choices[0].text
        last = chunk.choices[0].finish_reason or last
        drafts += "draft" in (getattr(chunk, "unmask", None) or {})
    check(text == whole.choices[0].text, f"the stream gave {text!r}, the whole answer {whole.choices[0].text!r}")
    check(last == whole.choices[0].finish_reason and usage == whole.usage, f"{last}, {usage}")
    check(drafts > 0, "no drafts")

    stop = text.strip()[1:4]
    stopped = client.completions.create(**wanted, stop=[stop])
    check(stopped.choices[0].text == text[: text.index(stop)], f"{stopped.choices[0].text!r} stops before {stop!r}")
    check(stopped.choices[0].finish_reason == "stop", str(stopped))

    own = {"policy": "autoregressive" if able else {"fixed": {"steps": 1}}}
    short = client.completions.create(**{**wanted, "max_tokens": 3}, extra_body={"unmask": own})
    check(short.choices[0].finish_reason == "length" and short.usage.completion_tokens == 3, str(short))
    check(short.unmask["policy"] == ("autoregressive" if able else {"fixed": {"steps": 1, "order": "confidence"}}), str(short))
    return {"text": text, "usage": usage.model_dump(exclude_none=True), "drafts": drafts, "unmask": whole.unmask}


def infill(client: openai.OpenAI, model: str, able: bool):
    def ask():
        return client.completions.create(
            model=model, prompt="def add(a, b):\n", suffix="    return total\n", max_tokens=32, temperature=0
        )

    if not able:
        return refused(openai.BadRequestError, ask, "suffix")
    return ask().choices[0].text


def chat(client: openai.OpenAI, model: str, able: bool):
    messages = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]

    def ask(**more):
        return client.chat.completions.create(model=model, messages=messages, max_completion_tokens=16, seed=1, **more)

    if not able:
        return refused(openai.BadRequestError, ask, "chat")
    whole = ask()
    check(whole.choices[0].message.role == "assistant", str(whole))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in ask(stream=True))
    check(text == whole.choices[0].message.content, f"the stream gave {text!r}, the whole answer {whole}")
    return text


def main() -> None:
    base_url, prompt = sys.argv[1], (sys.argv[2] if len(sys.argv) > 2 else PROMPT)
    client = openai.OpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=60)
    models = [model.id for model in client.models.list()]
    model = client.models.retrieve(models[0])
    complete = lambda **more: client.completions.create(**{"model": model.id, "prompt": "x", **more})
    bad = {
        "model": refused(openai.NotFoundError, lambda: complete(model="no-such-model"), "no-such-model"),
        "prompt": refused(openai.BadRequestError, lambda: complete(prompt=""), "prompt"),
        "fields": refused(openai.BadRequestError, lambda: complete(n=2, echo=True, temperature=-1), "n: ", "echo: "),
        "key": refused(openai.BadRequestError, lambda: complete(extra_body={"colour": 1}), "colour"),
    }
    print(json.dumps({
        "models": models,
        "completion": completion(client, model.id, model.unmask["autoregressive"], prompt),
        "infill": infill(client, model.id, model.unmask["infill"] or model.unmask["infill_by_masks"]),
        "chat": chat(client, model.id, model.unmask["chat"]),
        "bad": bad,
    }))


if __name__ == "__main__":
    main()
