"""From raw text to a corpus: stages over parts, each decision kept (report section 3.1)."""

from qwen2.pipeline.corpus.keep import kept_documents
from qwen2.pipeline.corpus.layout import Layout
from qwen2.pipeline.corpus.page import terminal_summary
from qwen2.pipeline.corpus.recipe import CorpusRecipe
from qwen2.pipeline.corpus.run import CorpusRun, run_corpus

__all__ = [
    "CorpusRecipe",
    "CorpusRun",
    "Layout",
    "kept_documents",
    "run_corpus",
    "terminal_summary",
]
