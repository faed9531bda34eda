"""Sphinx's settings for the site, whose sources `pages` writes. Nothing is loaded from the internet."""

# ruff: noqa: A001 (Sphinx chose the name, and reads the file as a script)
project = html_title = "A reference ML platform"
copyright = ""
language = "en"
extensions = ["myst_nb"]
myst_heading_anchors = 4
nb_execution_mode = "off"
nb_merge_streams = True
# MyST-NB would fetch the widgets' JavaScript from a public server; a page shows a progress bar as text.
nb_ipywidgets_js: dict[str, str] = {}
nb_code_prompt_show = "Show the code"
nb_code_prompt_hide = "Hide the code"

html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["style.css"]
html_js_files = ["focus.js"]
html_show_copyright = html_show_sphinx = html_show_sourcelink = html_copy_source = False
