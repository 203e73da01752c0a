"""A Hugging Face Hub on the loopback address, as far as huggingface_hub speaks to it for models.

Repositories are kept in memory as lists of commits. Large files go by the LFS batch interface and come by a redirect
to another host, as from the Hub to its storage; Xet is not spoken. `Hub.faults` injects
what can go wrong.
"""
from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

LARGE = ('.safetensors', '.npz', '.png')  # what the Hub's own .gitattributes keeps in LFS


@dataclasses.dataclass
class Repository:
    private: bool = False
    commits: dict[str, dict[str, bytes]] = dataclasses.field(
        default_factory=lambda: {'0' * 40: {'.gitattributes': b''}})
    tags: dict[str, str] = dataclasses.field(default_factory=dict)

    def resolve(self, revision: str) -> str | None:
        """Commit of a branch, tag or commit; None if there is none."""
        if revision in ('main', 'HEAD'):
            return list(self.commits)[-1]
        return revision if revision in self.commits else self.tags.get(revision)


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest()


def oid(path: str, data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() if path.endswith(LARGE) else git_sha1(data)


class Hub(ThreadingHTTPServer):
    """Serves while the process lives.

    Attributes:
        url: For $HF_ENDPOINT.
        token: The only one that may write or see what is private; its owner may write to `accounts`.
        repositories: By `<account>/<name>`.
        storage: Uploaded large files by sha256.
        requests: (method, path) of each request.
        faults: By a part of the path: called with the request's handler, which it may answer (and return True).
    """
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, port: int = 0):
        super().__init__(('127.0.0.1', port), Handler)
        self.url = f'http://127.0.0.1:{self.server_port}'
        self.token, self.accounts = 'hf_loopback', ('acme', 'owner')
        self.clear()
        threading.Thread(target=self.serve_forever, kwargs={'poll_interval': 0.05}, daemon=True).start()

    def clear(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.storage: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.faults: dict[str, Callable[[Handler], bool]] = {}

    def commit(self, repo_id: str, files: dict[str, bytes]) -> str:
        """Put files into a repository, made if it is not there, behind the client's back."""
        repository = self.repositories.setdefault(repo_id, Repository())
        tree = {**repository.commits[repository.resolve('main')], **files}
        commit = hashlib.sha1(f'{repo_id}{len(repository.commits)}'.encode()).hexdigest()
        repository.commits[commit] = tree
        return commit


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    server: Hub
    cut: int | None  # set by a fault: how many bytes of a file are sent

    def log_message(self, *args) -> None:
        pass

    def __getattr__(self, name: str):
        if name.startswith('do_'):
            return self.dispatch
        raise AttributeError(name)

    def dispatch(self) -> None:
        self.body, self.cut = self._read(), None
        self.server.requests.append((self.command, self.path))
        if any(part in self.path and fault(self) for part, fault in list(self.server.faults.items())):
            return
        path = unquote(urlsplit(self.path).path)
        for method, pattern, answer in ROUTES:
            if self.command in method.split() and (match := re.fullmatch(pattern, path)):
                answer(self, *match.groups())
                return
        self.fail(404)

    def _read(self) -> bytes:
        if self.headers.get('Transfer-Encoding') != 'chunked':
            return self.rfile.read(int(self.headers.get('Content-Length', 0)))
        data = b''
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def send(self, data: bytes = b'', status: int = 200, cut: int | None = None, **headers: str) -> None:
        """Answer; `cut` bytes are sent of those that are announced, and the connection is closed."""
        self.send_response(status)
        for name, value in {'Content-Length': str(len(data)), **headers}.items():
            self.send_header(name.replace('_', '-'), value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(data[:cut])
            self.close_connection = self.close_connection or cut is not None

    def json(self, answer: object, status: int = 200, **headers: str) -> None:
        self.send(json.dumps(answer).encode(), status, Content_Type='application/json', **headers)

    def fail(self, status: int, code: str = '', **headers: str) -> None:
        self.json({'error': code or str(status)}, status, **({'X_Error_Code': code} if code else {}), **headers)

    @property
    def known(self) -> bool:
        return self.headers.get('Authorization') == f'Bearer {self.server.token}'

    def writes(self, repo_id: str) -> bool:
        """Whether the request may write; if not, it has been answered."""
        if not self.known:
            self.fail(401)
        elif repo_id.partition('/')[0] not in self.server.accounts:
            self.fail(403)
        else:
            return True
        return False

    def repository(self, repo_id: str) -> Repository | None:
        """A repository that the request may see; if there is none, it has been answered."""
        repository = self.server.repositories.get(repo_id)
        if repository is None or repository.private and not self.known:
            self.fail(404 if self.known else 401, 'RepoNotFound')
            return None
        return repository

    def at(self, repo_id: str, revision: str) -> tuple[Repository, str] | None:
        if repository := self.repository(repo_id):
            if commit := repository.resolve(revision):
                return repository, commit
            self.fail(404, 'RevisionNotFound')
        return None

    def create(self) -> None:
        wanted = json.loads(self.body)
        repo_id = f"{wanted['organization']}/{wanted['name']}"
        if not self.writes(repo_id):
            return
        url = f'{self.server.url}/{repo_id}'
        if repo_id in self.server.repositories:
            self.json({'error': 'You already created this model repo', 'url': url}, 409)
            return
        private = wanted.get('visibility') == 'private' or bool(wanted.get('private'))
        self.server.repositories[repo_id] = Repository(private)
        self.json({'url': url})

    def validate_yaml(self) -> None:
        header = json.loads(self.body)['content'].split('---\n')[1]
        try:
            assert yaml.safe_load(header)['model-index'][0]['results'][0]['metrics'][0]['value'] is not None
            self.json({'errors': [], 'warnings': []})
        except (yaml.YAMLError, KeyError, IndexError, AssertionError) as e:
            self.json({'errors': [{'message': str(e)}], 'warnings': []}, 400)

    def preupload(self, repo_id: str, revision: str) -> None:
        if self.writes(repo_id) and (found := self.at(repo_id, revision)):
            tree = found[0].commits[found[1]]
            self.json({'files': [
                {'path': f['path'], 'uploadMode': 'lfs' if f['path'].endswith(LARGE) else 'regular',
                 'shouldIgnore': False, 'oid': oid(f['path'], tree[f['path']]) if f['path'] in tree else None}
                for f in json.loads(self.body)['files']]})

    def lfs_batch(self, repo_id: str) -> None:
        if self.writes(repo_id):
            href = f'{self.server.url}/lfs/{repo_id}'
            self.json({'transfer': 'basic', 'objects': [
                {'oid': o['oid'], 'size': o['size'], **({} if o['oid'] in self.server.storage else {'actions': {
                    'upload': {'href': f"{href}/{o['oid']}"}, 'verify': {'href': f'{href}/verify'}}})}
                for o in json.loads(self.body)['objects']]})

    def lfs_upload(self, repo_id: str, sha256: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != sha256:
            self.fail(400)
        else:
            self.server.storage[sha256] = self.body
            self.send()

    def lfs_verify(self, repo_id: str) -> None:
        self.send(status=200 if json.loads(self.body)['oid'] in self.server.storage else 404)

    def commit(self, repo_id: str, revision: str) -> None:
        if not self.writes(repo_id) or self.repository(repo_id) is None:
            return
        files = {}
        for line in map(json.loads, self.body.splitlines()):
            value = line['value']
            if line['key'] == 'file':
                files[value['path']] = base64.b64decode(value['content'])
            elif line['key'] == 'lfsFile':
                files[value['path']] = self.server.storage[value['oid']]
        commit = self.server.commit(repo_id, files)
        self.json({'commitUrl': f'{self.server.url}/{repo_id}/commit/{commit}', 'commitOid': commit, 'success': True})

    def tag(self, repo_id: str, revision: str) -> None:
        if self.writes(repo_id) and (found := self.at(repo_id, revision)):
            name = json.loads(self.body)['tag']
            if name in found[0].tags:
                self.fail(409)
            else:
                found[0].tags[name] = found[1]
                self.send()

    def info(self, repo_id: str, revision: str | None) -> None:
        if found := self.at(repo_id, revision or 'main'):
            repository, commit = found
            self.json({'id': repo_id, 'modelId': repo_id, 'sha': commit, 'private': repository.private, 'tags': [],
                       'siblings': [{'rfilename': path} for path in repository.commits[commit]]})

    def tree(self, repo_id: str, revision: str) -> None:
        if found := self.at(repo_id, revision):
            self.json([
                {'type': 'file', 'path': path, 'size': len(data), 'oid': git_sha1(data),
                 **({'lfs': {'oid': oid(path, data), 'size': len(data), 'pointerSize': 130}}
                    if path.endswith(LARGE) else {})}
                for path, data in found[0].commits[found[1]].items()])

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        if not (found := self.at(repo_id, revision)):
            return
        repository, commit = found
        data = repository.commits[commit].get(path)
        if data is None:
            self.fail(404, 'EntryNotFound', X_Repo_Commit=commit)
        elif path.endswith(LARGE):
            self.server.storage[oid(path, data)] = data
            location = f'http://localhost:{self.server.server_port}/storage/{oid(path, data)}?expires=never'
            self.send(status=302, Location=location, X_Repo_Commit=commit, X_Linked_Size=str(len(data)),
                      X_Linked_ETag=f'"{oid(path, data)}"')
        else:
            self.serve(data, oid(path, data), X_Repo_Commit=commit)

    def stored(self, sha256: str) -> None:
        if 'Authorization' in self.headers:  # the token is not for the storage
            self.fail(400)
        else:
            self.serve(self.server.storage[sha256], sha256)

    def serve(self, data: bytes, etag: str, **headers: str) -> None:
        """A file or, where `Range` asks for it, its end."""
        headers |= {'ETag': f'"{etag}"', 'Accept_Ranges': 'bytes'}
        if wanted := re.fullmatch(r'bytes=(\d+)-', self.headers.get('Range', '')):
            start = int(wanted[1])
            headers['Content_Range'] = f'bytes {start}-{len(data) - 1}/{len(data)}'
            self.send(data[start:], 206, cut=self.cut, **headers)
        else:
            self.send(data, cut=self.cut, **headers)


ID = r'([^/]+/[^/]+)'
ROUTES = (
    ('POST', '/api/repos/create', Handler.create),
    ('POST', '/api/validate-yaml', Handler.validate_yaml),
    ('POST', f'/api/models/{ID}/preupload/(.+)', Handler.preupload),
    ('POST', rf'/{ID}\.git/info/lfs/objects/batch', Handler.lfs_batch),
    ('PUT', f'/lfs/{ID}/([0-9a-f]+)', Handler.lfs_upload),
    ('POST', f'/lfs/{ID}/verify', Handler.lfs_verify),
    ('POST', f'/api/models/{ID}/commit/(.+)', Handler.commit),
    ('POST', f'/api/models/{ID}/tag/(.+)', Handler.tag),
    ('GET', f'/api/models/{ID}(?:/revision/(.+))?', Handler.info),
    ('GET', f'/api/models/{ID}/tree/(.+)', Handler.tree),
    ('HEAD GET', f'/{ID}/resolve/([^/]+)/(.+)', Handler.resolve),
    ('HEAD GET', '/storage/([0-9a-f]+)', Handler.stored),
)
