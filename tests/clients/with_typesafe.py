"""typesafe-sdk, a client of /v1/systemone."""

from scene import FILE, KEY, SERVER, held
from typesafe_sdk import Choice, Image, Noul, Score, TypeSafeClient

with TypeSafeClient(api_key=KEY, base_url=SERVER) as client:
    image = Image.from_bytes(FILE) if hasattr(Image, "from_bytes") else Image(FILE)
    answer = client.system_one(
        state=["A picture:", image],
        questions={
            "star": Noul(instructions="Is there a green star?"),
            "shape": Choice(instructions="Which shape is green?", criteria={"star": None, "circle": None}),
            "many": Score(instructions="How many shapes are there?", criteria=["none", "one", "several"]),
        },
    )
    held("noul", answer.nouls["star"].noul, float)
    held("score", answer.scores["many"].score, float)
    print(f"choice: {answer.choices['shape'].choice} {answer.choices['shape'].probabilities}")
    assert answer.choices["shape"].choice == "star"
