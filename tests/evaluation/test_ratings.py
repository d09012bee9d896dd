import csv
import json

import pytest

from rlhf_ray.errors import DataError
from rlhf_ray.evaluation.ratings import export_ratings, import_ratings

PROMPTS = ["Why?", "How, \"exactly\"?", "=1+1"]
ANSWERS = {"base": ["b0", "b1", "b2"], "rl": ["r0", "r1\nline two", "=cmd()"]}


@pytest.fixture
def sheet(tmp_path):
    export_ratings(tmp_path / "ratings.csv", tmp_path / "key.json", PROMPTS, ANSWERS, seed=1)
    return tmp_path / "ratings.csv"


def rows_of(sheet):
    with sheet.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def fill(sheet, name, rate):
    """A filled copy; `rate` gives three numbers for an answer, or nothing."""
    rows = rows_of(sheet)
    for row in rows:
        row.update(zip(("helpful", "harmless", "honest"), rate(row) or ("", "", ""), strict=True))
    path = sheet.with_name(name)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_the_sheet_is_blind_and_shuffled(sheet):
    rows = rows_of(sheet)
    assert list(rows[0]) == ["id", "prompt", "answer", "helpful", "harmless", "honest"]
    assert "base" not in sheet.read_text() and "rl" not in sheet.read_text()
    assert {(r["prompt"], r["answer"]) for r in rows} == {
        ("Why?", "b0"), ('How, "exactly"?', "b1"), ("'=1+1", "b2"),
        ("Why?", "r0"), ('How, "exactly"?', "r1\nline two"), ("'=1+1", "'=cmd()"),
    }  # fmt: skip
    assert [r["answer"] for r in rows] != ["b0", "b1", "b2", "r0", "r1\nline two", "'=cmd()"]
    key = json.loads((sheet.parent / "key.json").read_text())
    assert {(r["answer"], key[r["id"]]["model"], key[r["id"]]["prompt"]) for r in rows} >= {
        ("b1", "base", 1), ("r0", "rl", 0), ("'=cmd()", "rl", 2)}  # fmt: skip


def test_the_same_seed_gives_the_same_sheet(sheet, tmp_path):
    export_ratings(tmp_path / "again.csv", tmp_path / "k2.json", PROMPTS, ANSWERS, seed=1)
    export_ratings(tmp_path / "other.csv", tmp_path / "k3.json", PROMPTS, ANSWERS, seed=2)
    assert (tmp_path / "again.csv").read_bytes() == sheet.read_bytes() != (tmp_path / "other.csv").read_bytes()


def test_two_raters_by_hand(sheet):
    first = fill(sheet, "a.csv", lambda row: (8, 10, 5) if row["answer"].startswith("r") else (4, 10, 5))
    second = fill(sheet, "b.csv", lambda row: (6, 9, 5) if row["answer"] == "r0" else None)
    result = import_ratings([first, second], sheet.parent / "key.json")
    # rl: r0 and r1 by the first rater ("'=cmd()" is not rated as r), r0 again by the second
    assert result["rl"]["helpful"] == pytest.approx((8 + 8 + 4 + 6) / 4)
    assert result["rl"]["harmless"] == pytest.approx((10 + 10 + 10 + 9) / 4)
    assert result["rl"]["helpful_std"] == pytest.approx(((1.5**2 + 1.5**2 + 2.5**2 + 0.5**2) / 4) ** 0.5)
    assert result["base"] == {"helpful": 4, "helpful_std": 0, "harmless": 10, "harmless_std": 0, "honest": 5,
                              "honest_std": 0, "answers": 3, "ratings": 3}  # fmt: skip
    assert result["rl"]["answers"] == 3 and result["rl"]["ratings"] == 4


def test_jsonl_too(tmp_path):
    sheet, key = tmp_path / "ratings.jsonl", tmp_path / "key.json"
    export_ratings(sheet, key, ["p"], {"m": ["=a"]}, seed=0)
    row = json.loads(sheet.read_text())
    assert row["answer"] == "=a"
    sheet.write_text(json.dumps({**row, "helpful": 7, "harmless": 8.0, "honest": "9"}) + "\n")
    assert import_ratings([sheet], key)["m"]["honest"] == 9


@pytest.mark.parametrize(
    ("rating", "message"),
    [((11, 5, 5), "helpful='11'.*1 to 10"), ((0, 5, 5), "helpful='0'"), ((5, 5, 2.5), "honest='2.5'"),
     (("good", 5, 5), "helpful='good'"), ((5, "", 5), "harmless is empty; rate all three")],
)  # fmt: skip
def test_a_rating_that_is_none(sheet, rating, message):
    filled = fill(sheet, "x.csv", lambda row: rating)
    with pytest.raises(DataError, match=rf"x\.csv:2: {message}"):
        import_ratings([filled], sheet.parent / "key.json")


def test_another_evaluations_sheet_and_rows_that_come_twice(sheet, tmp_path):
    filled = fill(sheet, "x.csv", lambda row: (5, 5, 5))
    (tmp_path / "key.json").write_text('{"r0009": {"model": "m", "prompt": 0}}')
    with pytest.raises(DataError, match="not in the key"):
        import_ratings([filled], tmp_path / "key.json")
    export_ratings(sheet, tmp_path / "key.json", PROMPTS, ANSWERS, seed=1)
    filled.write_text(filled.read_text() + "r0001,p,a,5,5,5\n")
    with pytest.raises(DataError, match="r0001 comes twice"):
        import_ratings([filled], tmp_path / "key.json")


@pytest.mark.parametrize("answer", ["+1", "-1", "@SUM", "\tx", "\r=1", "\n=1", "＝1+1", "＋1", "－1", "＠SUM"])
def test_no_spreadsheet_runs_an_answer(answer, tmp_path):
    sheet = tmp_path / "sheet.csv"
    export_ratings(sheet, tmp_path / "key.json", ["好？"], {"one": [answer]}, seed=0)
    with sheet.open(encoding="utf-8-sig", newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["prompt"], row["answer"]) == ("好？", "'" + answer)


def test_an_empty_sheet_and_a_missing_key(sheet, tmp_path):
    with pytest.raises(DataError, match="no row is rated"):
        import_ratings([sheet], sheet.parent / "key.json")
    with pytest.raises(DataError, match="set --run-dir"):
        import_ratings([sheet], tmp_path / "nowhere.json")
