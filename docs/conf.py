"""The documentation site: notebooks as they are, docstrings as `help` shows them, formulas as MathML.

`tools/docs.py` lays the pages out and builds them; Sphinx reads this file.
"""
import json
import re
from configparser import ConfigParser
from pathlib import Path

import latex2mathml.converter
from docutils.nodes import SkipNode

ROOT = Path(__file__).resolve().parents[1]
parser = ConfigParser(delimiters=['='])
parser.read(ROOT/'settings.ini', encoding='utf-8')
settings = parser['DEFAULT']

project = settings['lib_name']
author = settings['author']
release = settings['version']
copyright = settings['copyright']

extensions = ['myst_nb', 'sphinx.ext.apidoc', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon']
exclude_patterns = ['README.md', 'nbs/index.ipynb']
root_doc = 'index'

# Notebooks: outputs as they were committed
nb_execution_mode = 'off'
nb_merge_streams = True
myst_enable_extensions = ['dollarmath', 'html_image']
myst_heading_anchors = 4

# The reference: one page for each module, made from the package as it is imported
apidoc_modules = [dict(path=str(ROOT/'rs_toolkit'), destination='reference', separate_modules=True,
                       module_first=True, automodule_options={'members', 'show-inheritance'})]
autodoc_inherit_docstrings = False
autodoc_member_order = 'bysource'
autodoc_typehints = 'none'
add_module_names = False
default_role = 'code'

# A page
html_theme = 'furo'
html_title = project
html_static_path = ['_static']
html_css_files = ['pages.css']
html_math_renderer = 'mathml'
html_copy_source = False
html_show_sourcelink = False
html_theme_options = dict(top_of_page_buttons=[])


MOVING = ROOT/'nbs/explore/export'       # pages without a kernel, where `rs-toolkit export` has made them

def moving(name, text):
    "The page that moves, in place of the picture of an explorer."
    page = MOVING/f'{Path(name).name}.html'
    if Path(name).parent.name != 'explore' or not page.exists(): return text
    frame = f'<iframe class="moving" src="export/{page.name}" title="{page.stem}, with sliders"></iframe>'
    return re.sub(rf'!\[[^]]*\]\(images/{page.stem}\.png[^)]*\)', frame, text)

def written_for_pages(app, name, source):
    "A notebook without what speaks to nbdev and papermill; links to headings as this site names them."
    if not str(app.env.doc2path(name)).endswith('.ipynb'): return
    notebook = json.loads(source[0])
    cells = [cell for cell in notebook['cells'] if cell['cell_type'] != 'raw' and '#| hide\n' not in cell['source']]
    for cell in cells:
        if cell['cell_type'] == 'code':
            cell['source'] = [line for line in cell['source'] if not line.startswith('#|')]
        else:
            text = moving(name, ''.join(cell['source']))
            cell['source'] = re.sub(r'\]\(#[^)]*\)', lambda link: link[0].lower(), text)
    notebook['cells'] = [cell for cell in cells if cell['source']]
    source[0] = json.dumps(notebook)

def as_text(app, what, name, thing, options, lines):
    "A docstring is plain text: what looks like markup in it means itself, and `code` is code."
    for number, line in enumerate(lines):
        parts = line.split('`')
        plain = [re.sub(r'([*|_\\])', r'\\\1', part) for part in parts[::2]]
        code = [f'``{part}``' for part in parts[1::2]]
        lines[number] = ''.join(part for pair in zip(plain, code + ['']) for part in pair)

def inline_formula(page, node): formula(page, node, 'inline')

def displayed_formula(page, node): formula(page, node, 'block')

def formula(page, node, display):
    "MathML: no script, no font, nothing to fetch."
    page.body.append(latex2mathml.converter.convert(node.astext(), display=display))
    raise SkipNode

def setup(app):
    app.add_html_math_renderer('mathml', (inline_formula, None), (displayed_formula, None))
    app.connect('source-read', written_for_pages)
    app.connect('autodoc-process-docstring', as_text, priority=400)       # before napoleon, which reads "Arguments:"
