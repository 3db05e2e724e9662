"""Sphinx settings of the report; `cxr_nb.report.build_site` writes its pages. Nothing is fetched when a page is read."""
import importlib.metadata
from pathlib import Path

project, author, language = "cxr_nb", "", "en"
extensions = ["myst_nb"]
nb_execution_mode = "off"
nb_merge_streams = True
nb_ipywidgets_js = {}
nb_code_prompt_show = nb_code_prompt_hide = "imports"  # only these cells are folded
myst_enable_extensions = ["dollarmath", "amsmath"]
html_theme = "sphinx_book_theme"
html_theme_options = {"show_toc_level": 2, "use_download_button": False, "use_fullscreen_button": False, "show_navbar_depth": 1, "footer_content_items": [], "navbar_persistent": []}
html_copy_source = False
html_show_copyright = False
html_last_updated_fmt = None
mathjax_path = "tex-svg-full.js"
html_static_path = ["style.css", str(Path(importlib.metadata.distribution("sphinx-mathjax-offline").locate_file("sphinx-mathjax-offline/static/mathjax"))/mathjax_path)]
html_css_files = ["style.css"]
