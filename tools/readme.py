"""Render README.md from nbs/index.ipynb.

    python tools/readme.py [FOLDER]

runs the notebook and writes README.md (and its figures) into FOLDER.
"""
import base64
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]

def render(folder):
    "README.md and nbs/images/index_*.png below `folder`."
    notebook = nbformat.read(ROOT/'nbs/index.ipynb', 4)
    NotebookClient(notebook, kernel_name='python3', store_widget_state=False,
                   resources={'metadata': {'path': str(ROOT/'nbs')}}).execute()
    parts = []
    pictures = 0
    for cell in notebook.cells:
        if cell.cell_type == 'markdown': parts.append(from_top(cell.source))
        if cell.cell_type != 'code' or '#| hide' in cell.source.split('\n'): continue
        parts.append(code(cell.source))
        for output in cell.outputs:
            data = output.get('data', {})
            if 'image/png' in data and output.get('name') != 'stderr':
                pictures += 1
                name = f'nbs/images/index_{pictures}.png'
                parts.append(picture(data['image/png'], name, words_of(cell.source), folder))
            elif text(output): parts.append(text(output))
    (folder/'README.md').write_text('\n\n'.join(parts) + '\n', encoding='utf-8')

def from_top(text):
    "Links of the notebook, which lies in nbs/, as README has them."
    return text.replace('](explore/', '](nbs/explore/').replace('](../', '](')

def code(source):
    "A cell as a block of Python, without nbdev's directives."
    lines = [line for line in source.split('\n') if not line.startswith('#|')]
    return '\n'.join(['```python', *lines, '```'])

def words_of(source):
    "What a cell's picture shows, in words; as Quarto writes it."
    [words] = re.findall(r'^#\| fig-alt: (.+)', source, re.M)
    return words

def picture(content, name, words, folder):
    "A picture goes to a file below `folder`."
    (folder/name).parent.mkdir(parents=True, exist_ok=True)
    (folder/name).write_bytes(base64.b64decode(content))
    return f'![{words}]({name})'

def text(output):
    "An output as markdown: tables stay tables, text is indented; empty where there is nothing to read."
    data = output.get('data', {})
    if output.get('name') == 'stderr': return ''
    if 'text/markdown' in data: return data['text/markdown']
    plain = data.get('text/plain') or output.get('text', '')
    return '\n'.join('    ' + line for line in plain.rstrip().split('\n')) if plain.strip() else ''

if __name__ == '__main__': render(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
