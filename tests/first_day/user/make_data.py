"""Sums in words of a chat: rows of a user, as they would come from elsewhere."""

import json

import pyarrow
import pyarrow.parquet

rows = [
    {
        "prompt": [{"role": "user", "content": f"{a}+{b}"}],
        "completion": [{"role": "assistant", "content": f"{a + b:02}"}],
        "answer": f"{a + b:02}",
    }
    for a in range(6)
    for b in range(6)
]
chats = [{"messages": row["prompt"] + row["completion"]} for row in rows]
asked = [{"prompt": row["prompt"], "answer": row["answer"]} for row in rows]
for name, chosen in (("demonstrations", rows), ("chats", chats), ("questions", asked), ("held_out", asked[::6])):
    with open(f"{name}.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in chosen)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(chosen), f"{name}.parquet")
