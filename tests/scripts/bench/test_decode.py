"""The decoding benchmark: figures from replies."""

from scripts.bench import decode as bench


def reply(seconds: list[float], ids: list[int]):
    return [{"seconds": seconds, "ids": ids, "peak_rss_mib": 100.0}]


def test_the_rate_leaves_out_prompt_and_first_tokens():
    # 8 tokens: the first at 5 s, the next two a second each, then 5 of half a second.
    assert bench.rate({"seconds": [5, 6, 7, 7.5, 8, 8.5, 9, 9.5]}) == 2


def test_figures_of_a_player():
    turns = {"ours": [reply([0.5, 1.0], [4, 5, 6])], "llama.cpp": [reply([0.2, 0.4], [4, 5, 7])]}
    figures = bench.summary({"since_start_s": 7.0}, turns, "llama.cpp", [5.0, 20.0, 10.0])
    assert figures == {"rate": 10.0, "prompt_s": 0.2, "first_s": 7.0, "peak_rss_mib": 100.0, "same": 2}


def test_one_that_is_not_there_is_told(capsys):
    failures = {"llama.cpp": "ended (status 1): No module named 'llama_cpp'"}
    bench.show({"players": {}, "speed": {}, "opponent": None, "failures": failures})
    assert "llama.cpp: NOT AVAILABLE: ended (status 1): No module" in capsys.readouterr().out
