"""Wrong titles are titles of other rows, in the stated share."""

from scripts.make_noisy_titles import WRONG, is_wrong, with_wrong_titles


def test_a_stated_share_of_titles_is_that_of_another_row():
    rows = [
        {"messages": [{"role": "user", "content": f"passage {n}"}, {"role": "assistant", "content": f"Title: {n}"}]}
        for n in range(1000)
    ]
    changed = with_wrong_titles(rows)
    moved = [a["messages"][1] != b["messages"][1] for a, b in zip(rows, changed, strict=True)]
    assert moved == [is_wrong(row) for row in rows] and abs(sum(moved) / 1000 - WRONG) < 0.05
    titles = [sorted(row["messages"][1]["content"] for row in each) for each in (rows, changed)]
    assert titles[0] == titles[1] and [row["messages"][0] for row in rows] == [row["messages"][0] for row in changed]
