"""Details fold away behind what they found."""

import nbformat
from docutils import nodes

from sae_stability.book import folds

new_code, new_markdown = nbformat.v4.new_code_cell, nbformat.v4.new_markdown_cell


def figure(title: str) -> nbformat.NotebookNode:
    metadata = {"image/png": {"alt": "what it shows", "title": title}}
    return new_code("# a comment is no heading\nshow()", outputs=[nbformat.v4.new_output("display_data", {}, metadata=metadata)])


def prose() -> nbformat.NotebookNode:
    return new_code("say()", outputs=[nbformat.v4.new_output("display_data", {"text/markdown": "12 features"})])


def told(*cells: nbformat.NotebookNode) -> list[str]:
    return [cell.source for cell in folds.told(nbformat.v4.new_notebook(cells=list(cells))).cells if cell.cell_type == "markdown"]


def test_a_fold_says_the_finding_of_its_first_figure_and_its_own_words_where_it_has_none():
    mark = new_markdown("## Section\n\nWhy.\n\n<!-- fold: In numbers -->")
    after = new_markdown("## Next")
    (found, _) = told(mark.copy(), prose(), figure("Half of it\nis $\\tau$ & 0.7"), figure("Another"), after.copy())
    assert found == "## Section\n\nWhy.\n\n% fold: Half of it is $\\tau$ & 0.7"
    (words, _) = told(mark.copy(), prose(), after.copy(), figure("Of the next section"))
    assert words == "## Section\n\nWhy.\n\n% fold: In numbers"


def test_there_is_no_fold_where_there_is_nothing_to_fold():
    mark = new_markdown("## Section\n\n<!-- fold: In numbers -->")
    assert told(mark.copy(), new_code("nothing()"), new_markdown("## Next"), prose())[0] == "## Section\n\n"
    assert told(mark.copy(), new_markdown("More."))[0].endswith("% fold: In numbers")
    assert told(new_markdown("<!-- fold: In numbers -->\n\nText."))[0] == "% fold: In numbers\n\nText."
    assert told(new_markdown("No mark <!-- nor this -->")) == ["No mark <!-- nor this -->"]


def section(title: str, *children: nodes.Node) -> nodes.section:
    return nodes.section("", nodes.title("", title), *children)


def test_what_stands_behind_a_mark_folds_up_to_the_end_of_its_section():
    page, seen = nodes.document(None, None), [nodes.paragraph("", word) for word in ("before", "inside", "nested", "other", "last")]
    before, inside, nested, other, last = seen
    mark, second = nodes.comment("", "fold: a < b"), nodes.comment("", "fold: more")
    page += [
        section("one", before, mark, inside, section("two", nested)),
        section("three", other, nodes.comment("", "a remark"), second, last),
    ]
    folds.fold(page)
    told = [node.astext() for node in page.findall(lambda node: isinstance(node, nodes.raw | nodes.paragraph | nodes.title))]
    assert told == [
        *("one", "before", '<details class="more"><summary>a &lt; b</summary>', "inside", "two", "nested", "</details>"),
        *("three", "other", '<details class="more"><summary>more</summary>', "last", "</details>"),
    ]
