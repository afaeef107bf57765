"""What openai-python asks for, and what it makes of the answers."""
# openai==3.57.0
import asyncio
import json
import os

import openai

base = os.environ["BASE"] + "/v1"
client = openai.OpenAI(base_url=base, api_key=os.environ["KEY"], max_retries=0)

models = client.models.list().data
assert [model.id for model in models] == ["tiny"], models
assert client.models.retrieve("tiny").id == "tiny"

question = "Question: Ana has 12 coins. Ben gives Ana 7 more. How many coins does Ana have now?"
messages = [{"role": "user", "content": question}]
whole = client.chat.completions.create(model="tiny", messages=messages, max_tokens=20, temperature=0, logprobs=True, top_logprobs=2)
assert whole.choices[0].message.role == "assistant" and whole.choices[0].finish_reason in ("stop", "length")
assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
assert len(whole.choices[0].logprobs.content[0].top_logprobs) == 2

stream = client.chat.completions.create(
    model="tiny", messages=messages, max_tokens=20, temperature=0, stream=True, stream_options={"include_usage": True}
)
chunks = list(stream)
text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
assert text == whole.choices[0].message.content, (text, whole)
assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens and not chunks[-1].choices
assert chunks[0].choices[0].delta.role == "assistant"

several = client.completions.create(model="tiny", prompt=[question, question + " And Ben?"], max_tokens=4, n=2, logprobs=1, echo=True)
assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
assert several.choices[0].text.startswith(question)
assert several.choices[0].logprobs.token_logprobs[0] is None

schema = {
    "type": "object", "properties": {"coins": {"type": "integer"}}, "required": ["coins"], "additionalProperties": False,
}
answer = client.chat.completions.create(
    model="tiny", messages=messages, max_tokens=60, temperature=0,
    response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}},
)
assert isinstance(json.loads(answer.choices[0].message.content)["coins"], int)

tool = {"type": "function", "function": {"name": "add", "parameters": {
    "type": "object", "properties": {"a": {"type": "integer", "maximum": 9}}, "required": ["a"], "additionalProperties": False,
}}}
called = client.chat.completions.create(
    model="tiny", messages=messages, tools=[tool], tool_choice="required", parallel_tool_calls=False, max_tokens=80, temperature=0,
)
call = called.choices[0].message.tool_calls[0]
assert called.choices[0].finish_reason == "tool_calls" and call.function.name == "add" and json.loads(call.function.arguments)["a"] <= 9
messages += [called.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "19"}]
assert client.chat.completions.create(model="tiny", messages=messages, tools=[tool], max_tokens=5).choices

for kind, ask in {
    openai.AuthenticationError: lambda: openai.OpenAI(base_url=base, api_key="wrong").models.list(),
    openai.NotFoundError: lambda: client.chat.completions.create(model="gpt-4", messages=messages),
    openai.BadRequestError: lambda: client.chat.completions.create(model="tiny", messages=messages, temperature=-1),
}.items():
    try:
        ask()
    except kind as error:
        assert error.body["message"] and error.request_id, error
    else:
        raise AssertionError(f"no {kind.__name__}")


async def together():
    async with openai.AsyncOpenAI(base_url=base, api_key=os.environ["KEY"]) as many:
        ask = lambda i: many.completions.create(model="tiny", prompt=question + " " * (i % 3), max_tokens=16, temperature=0)
        answers = await asyncio.gather(*(ask(i) for i in range(24)))
    for kind in range(3):
        assert len({answer.choices[0].text for answer in answers[kind::3]}) == 1


asyncio.run(together())
