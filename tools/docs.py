"""Build the documentation site, without a network.

    python tools/docs.py [FOLDER]

writes it into FOLDER, `_docs` unless given. A warning, a link that leads nowhere, a missing picture, and anything that
a page would fetch from elsewhere are errors.
"""
import shutil
import sys
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from sphinx.cmd.build import build_main

ROOT = Path(__file__).resolve().parents[1]
PAGES = ['README.md', 'CONTRIBUTING.md', 'CHANGELOG.md', 'data/README.md', 'recipes/README.md']
MOVING = ROOT/'nbs/explore/export'        # pages without a kernel, where `rs-toolkit export` has made them
LEFT_OUT = shutil.ignore_patterns('.*', 'runs', 'export', '__pycache__')

def gather(folder):
    "The pages as they lie in the repository, with those of docs/ on top: links lead where they lead there."
    shutil.copytree(ROOT/'docs', folder, ignore=LEFT_OUT)
    shutil.copytree(ROOT/'nbs', folder/'nbs', ignore=LEFT_OUT)
    for page in PAGES:
        (folder/page).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT/page, folder/page)

class Page(HTMLParser):
    "What a page asks for, and the names in it that a link can ask for."
    def __init__(self, path):
        super().__init__()
        self.links = []
        self.loads = []
        self.names = set()
        self.feed(path.read_text(encoding='utf-8'))

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.names |= {given.get('id'), given.get('name')}
        if 'href' in given: (self.links if tag == 'a' else self.loads).append(given['href'])
        if 'src' in given: self.loads.append(given['src'])

def broken(site):
    "What is wrong with the links of a site, a line each."
    pages = {path: Page(path) for path in sorted(site.rglob('*.html'))}
    for path, page in pages.items():
        for link in page.links + page.loads:
            where = urlsplit(link)
            if where.scheme == 'data': continue
            if where.scheme or where.netloc:
                if link in page.loads: yield f'{path.relative_to(site)} fetches {link}'
                continue
            target = (path.parent/unquote(where.path)).resolve() if where.path else path
            if target.is_dir(): target = target/'index.html'
            missing = target in pages and where.fragment and unquote(where.fragment) not in pages[target].names
            if not target.exists() or missing: yield f'{path.relative_to(site)}: nothing lies at {link}'

def build(site):
    "Build the site, and return the number of what is wrong with it."
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder)/'source'
        built = Path(folder)/'site'
        gather(source)
        strict = ['--quiet', '--fail-on-warning', '--fresh-env']
        places = ['--conf-dir', str(ROOT/'docs'), '--doctree-dir', f'{folder}/doctrees']
        failed = build_main([*strict, *places, str(source), str(built)])
        if MOVING.is_dir(): shutil.copytree(MOVING, built/'nbs/explore/export')
        wrong = [] if failed else [*broken(built)]
        shutil.copytree(built, site, dirs_exist_ok=True)
    print(*wrong, sep='\n')
    return failed or len(wrong)

if __name__ == '__main__':
    site = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT/'_docs'
    sys.exit(min(build(site), 1))
