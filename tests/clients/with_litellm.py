"""LiteLLM: as an OpenAI server and as a vLLM server."""

import json

import litellm
from scene import BASE_URL, IMAGES, KEY, MODEL, check, content

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
    parameters = {"type": "object", "properties": {"kind": {"type": "string"}}, "required": ["kind"]}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    called = litellm.completion(messages=messages[:1], **common, tools=[tool], tool_choice="required")
    print(f"{provider}, tools: {json.loads(called.choices[0].message.tool_calls[0].function.arguments)['kind']}")
    form = {"type": "json_schema", "json_schema": {"name": "f", "schema": parameters, "strict": True}}
    found = litellm.completion(messages=messages[:1], **common, response_format=form).choices[0].message.content
    print(f"{provider}, structured output: {json.loads(found)['kind']}")
