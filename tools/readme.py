"""Render README.md from nbs/index.ipynb: `python tools/readme.py [FOLDER]` runs the notebook and writes README.md (and its figures) into FOLDER."""
import base64
import sys
from itertools import count
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]

def render(folder):
    "README.md and nbs/images/index_*.png below `folder`."
    nb = nbformat.read(ROOT/'nbs/index.ipynb', 4)
    NotebookClient(nb, kernel_name='python3', store_widget_state=False, resources={'metadata': {'path': str(ROOT/'nbs')}}).execute()
    parts, pictures = [], (f'nbs/images/index_{number}.png' for number in count(1))
    for cell in nb.cells:
        lines = cell.source.split('\n')
        if cell.cell_type == 'markdown': parts.append(cell.source.replace('](explore/', '](nbs/explore/'))
        elif '#| hide' not in lines:
            parts.append('```python\n' + '\n'.join(line for line in lines if not line.startswith('#|')) + '\n```')
            parts += [shown for output in cell.outputs if (shown := show(output, pictures, folder))]
    (folder/'README.md').write_text('\n\n'.join(parts) + '\n', encoding='utf-8')

def show(output, pictures, folder):
    "An output as markdown: pictures go to the next file, tables stay tables, text is indented."
    data = output.get('data', {})
    if output.get('name') == 'stderr': return None
    if 'image/png' in data:
        image = next(pictures)
        (folder/image).parent.mkdir(parents=True, exist_ok=True)
        (folder/image).write_bytes(base64.b64decode(data['image/png']))
        return f'![]({image})'
    text = data.get('text/markdown') or data.get('text/plain') or output.get('text', '')
    if 'text/markdown' in data: return text
    return '\n'.join('    ' + line for line in text.rstrip().split('\n')) if text.strip() else None

if __name__ == '__main__': render(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
