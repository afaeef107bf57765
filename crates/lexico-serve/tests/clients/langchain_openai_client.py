"""What langchain-openai asks for."""
# langchain-openai==1.7.4
import os

from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field

model = ChatOpenAI(model="tiny", base_url=os.environ["BASE"] + "/v1", api_key=os.environ["KEY"], temperature=0, max_tokens=150)
question = [HumanMessage("Question: Ana has 12 coins. Ben gives Ana 7 more. How many coins does Ana have now?")]
whole = model.invoke(question)
assert whole.usage_metadata["output_tokens"] > 0, whole
streamed = "".join(chunk.content for chunk in model.stream(question))
assert streamed == whole.content, (streamed, whole)


class Answer(BaseModel):
    """An answer."""

    coins: int = Field(ge=0, le=99)


structured = model.with_structured_output(Answer, method="json_schema").invoke(question)
assert 0 <= structured.coins <= 99, structured
called = model.bind_tools([Answer], tool_choice="Answer").invoke(question)
assert called.tool_calls[0]["name"] == "Answer" and called.tool_calls[0]["args"]["coins"] <= 99, called
