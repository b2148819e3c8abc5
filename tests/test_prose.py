import pytest

from tools.check_prose import BANNED_PHRASES, check, main


def problems(name, source):
    return [f"{problem.line}: {problem.text}" for problem in check(name, source)]


@pytest.mark.parametrize("phrase", BANNED_PHRASES)
def test_banned_phrases_are_found_in_any_case_and_across_line_breaks(phrase):
    broken = phrase.replace(" ", "\n").capitalize()
    assert problems("docs/page.md", f"One line.\n\nA sentence with {broken} in it.") == [
        f'3: banned: "{phrase.capitalize()}"'
    ]


def test_a_longer_word_that_contains_a_banned_one_passes():
    assert problems("docs/page.md", "The renewed lease of a janewright.") == []


@pytest.mark.parametrize("start", ["What", "Who"])
def test_relative_clauses_as_subjects_are_found(start):
    expected = f'sentence begins with "{start}" and is no question'
    assert problems("docs/page.md", f"A line.\n{start} waits is sent.") == [f"2: {expected}"]
    assert problems("docs/page.md", f"- {start} waits is sent") == [f"1: {expected}"]
    assert problems("docs/page.md", f"| a | {start} waits |") == [f"1: {expected}"]
    assert problems("docs/page.md", f"## {start} waits") == [f"1: {expected}"]
    assert problems("opsentry/a.py", f'"""Send. {start} waits is sent."""') == [f"1: {expected}"]
    assert problems("opsentry/a.py", f"x = 1  # {start} waits is sent") == [f"1: {expected}"]


def test_questions_pass():
    assert problems("docs/page.md", "What waits? The dispatcher asks: who is due?") == []


def test_a_sentence_may_have_40_words_in_docs_and_more_in_code():
    fits, too_long = "word " * 39 + "end.", "word " * 40 + "end."
    assert problems("docs/page.md", fits) == []
    assert problems("docs/page.md", too_long) == ["1: sentence of 41 words, at most 40 are allowed"]
    assert problems("opsentry/a.py", f'"""{too_long}"""') == []


def test_list_items_table_cells_and_code_are_sentences_of_their_own():
    words = "word " * 30
    assert (
        problems("docs/page.md", f"- {words}\n- {words}\n\n| {words} | {words} |\n\n`{'word ' * 50}` is one word") == []
    )


def test_code_blocks_are_searched_for_banned_phrases_only():
    assert problems("docs/page.md", "```sh\nWhat this is\necho anew\n```") == ['3: banned: "anew"']


def test_names_of_tests_are_split_into_words():
    source = "def test_what_waits_is_sent(): ...\n\n\nasync def test_a_rebuild_goes_on(): ...\n"
    assert problems("tests/test_a.py", source) == [
        '1: sentence begins with "What" and is no question',
        '4: banned: "goes on"',
    ]


def test_comments_and_docstrings_keep_their_line_numbers():
    source = '"""Say it.\n\nOne idea.\nSay it anew.\n"""\n\n# It\n# goes\n# on.\nsql = """\nSELECT 1 -- anew\n"""\n'
    assert problems("opsentry/a.py", source) == ['4: banned: "anew"', '8: banned: "goes on"', '11: banned: "anew"']


def test_joined_literals_are_one_sentence():
    assert problems("opsentry/a.py", 'x = (\n    "It goes "\n    "on."\n)\n') == ['2: banned: "goes on"']


def test_templates_are_read_without_tags():
    source = "<p>{{ name }}\n  is <b>told</b></p>\n{% if x %}\n<p>What waits</p>\n{# anew #}"
    assert problems("opsentry/a.html", source) == [
        '2: banned: "is told"',
        '4: sentence begins with "What" and is no question',
        '5: banned: "anew"',
    ]


def test_comments_of_sql_and_make_are_read():
    assert problems("migrations/a.sql", "SELECT 1;\n-- What waits\n") == [
        '2: sentence begins with "What" and is no question'
    ]
    assert problems("Makefile", "# Runs anew\n") == ['1: banned: "anew"']


def test_the_script_names_file_and_line_and_fails(tmp_path, capsys):
    (tmp_path / "README.md").write_text("Fine.\n\nNot anew.\n")
    assert main([], tmp_path) == 1
    assert capsys.readouterr().out == 'README.md:3: banned: "anew"\n'
    (tmp_path / "README.md").write_text("Fine.\n")
    assert main([], tmp_path) == 0
    assert capsys.readouterr().out == ""
