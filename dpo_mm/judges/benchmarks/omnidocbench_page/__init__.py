"""OmniDocBench's evaluation of whole pages: the response is one page as Markdown, the ground truth has all blocks of the page.

- `markdown`: splits a response into paragraphs, formulas and tables. `markdown_tables` reads tables with `|`.
- `truth`: blocks of the ground truth in reading order, with truncated paragraphs joined.
- `formulas`: the part of a formula that is compared.
- `matching`: pairs blocks with paragraphs (`quick_match`).
- `judges`: the figures per page.

The rules are those of commit 7bd6c2e (2025-12-01, version 1.5). Oddities that change a figure are part of them.

Source: Ouyang et al. 2024 (2412.07626), github.com/opendatalab/OmniDocBench (Apache-2.0): `configs/end2end.yaml`.
"""
