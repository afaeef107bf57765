"""What litellm asks for."""
# litellm==1.110.2
import os

import litellm

shared = {"model": "openai/tiny", "api_base": os.environ["BASE"] + "/v1", "api_key": os.environ["KEY"], "temperature": 0, "max_tokens": 12}
messages = [{"role": "user", "content": "Question: Ana has 12 coins."}]
whole = litellm.completion(messages=messages, **shared)
text = "".join(chunk.choices[0].delta.content or "" for chunk in litellm.completion(messages=messages, stream=True, **shared))
assert text == whole.choices[0].message.content, (text, whole)
assert whole.usage.completion_tokens > 0
plain = litellm.text_completion(**{**shared, "model": "text-completion-openai/tiny"}, prompt="Question: Ana has 12 coins.")
assert plain.choices[0].text
try:
    litellm.completion(messages=messages, **{**shared, "temperature": -1}, num_retries=0)
except litellm.BadRequestError:
    pass
else:
    raise AssertionError("a wrong temperature was taken")
