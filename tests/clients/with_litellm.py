"""LiteLLM: as an OpenAI server and as a vLLM server."""

import litellm
from scene import BASE_URL, IMAGES, KEY, MODEL, check, content, refused

for provider in ("openai", "hosted_vllm"):
    common = {"model": f"{provider}/{MODEL}", "api_base": BASE_URL, "api_key": KEY}
    for form in IMAGES:
        messages = [{"role": "user", "content": content(form)}]
        answer = litellm.completion(messages=messages, **common).choices[0].message
        check(f"{provider}, {form}", answer.content)
        messages += [answer, *messages]
        check(
            f"{provider}, {form}, second turn",
            litellm.completion(messages=messages, **common).choices[0].message.content,
        )
        messages[1] = answer.model_dump()
        check(
            f"{provider}, {form}, dumped turn",
            litellm.completion(messages=messages, **common).choices[0].message.content,
        )
        chunks = list(
            litellm.completion(messages=messages[:1], stream=True, stream_options={"include_usage": True}, **common)
        )
        check(f"{provider}, {form}, streamed", "".join(c.choices[0].delta.content or "" for c in chunks if c.choices))
        assert any(getattr(chunk, "usage", None) for chunk in chunks)
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    for fields, words in (
        ({"tools": [tool]}, "tools are not supported"),
        ({"response_format": {"type": "json_object"}}, "structured output is not supported"),
    ):
        try:
            litellm.completion(messages=messages[:1], **common, **fields)
        except litellm.BadRequestError as error:
            refused(f"{provider}, {next(iter(fields))}", error, words)
        else:
            raise SystemExit(f"{fields} was not refused")
