"""A Hugging Face Hub on loopback: as much of its HTTP interface as huggingface_hub uses to push and load a pair.

    with Hub() as hub:
        hub.url                                  for HF_ENDPOINT
        hub.repos["org/pair"].files("main")      what can be seen there, by path
        hub.requests                             what was asked: [method, path, JSON body]

Not spoken: Xet, which needs a content-addressed store of its own. Set HF_HUB_DISABLE_XET=1, and large files take the
LFS way, which the Hub keeps for clients without Xet.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKENS = {"hf_writer": "write", "hf_reader": "read"}
LFS_SUFFIXES = (".safetensors", ".bin")


@dataclass
class Repo:
    private: bool
    commits: dict = field(default_factory=dict)  # commit hash -> {path: content}
    refs: dict = field(default_factory=dict)  # branch -> commit hash

    def commit(self, ref, files, parent=None):
        """Add a commit, all at once, and return its hash."""
        files = self.commits.get(parent or self.refs.get(ref), {}) | files
        text = repr((ref, len(self.commits), sorted((path, git_hash(content)) for path, content in files.items())))
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha] = files
        self.refs[ref] = sha
        return sha

    def resolve(self, revision):
        """The commit that a branch or a commit hash names, or `None`."""
        return self.refs.get(revision) or (revision if revision in self.commits else None)

    def files(self, revision):
        return self.commits[self.resolve(revision)]


class Hub:
    def __init__(self):
        self.lock = threading.Lock()
        self.reset()

    def reset(self):
        self.repos, self.objects, self.requests = {}, {}, []
        self.broken_uploads = 0  # so many of the next uploads lose their connection half-way
        self.failures = {}  # part of a path -> status with which requests for such a path are answered

    def add(self, repo_id, files=None, private=False):
        self.repos[repo_id] = repo = Repo(private)
        repo.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"} | (files or {}))
        return repo

    def asked(self, pattern):
        """The requests, "METHOD /path", that match a pattern."""
        lines = [f"{method} {path}" for method, path, _ in self.requests]
        return [line for line in lines if re.search(pattern, line)]

    def __enter__(self):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.cdn_url = f"http://localhost:{self.server.server_port}"  # by another name: another host, to the client
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


class Refused(Exception):
    def __init__(self, status, message, code=None):
        self.status, self.message, self.code = status, message, code


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def handle_any(self):
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.body_read = False
        self.request_log = [self.command, self.path, None]
        self.hub.requests.append(self.request_log)
        try:
            for part, status in self.hub.failures.items():
                if part in url.path:
                    raise Refused(status, "out of order")
            for methods, pattern, action in ROUTES:
                match = re.fullmatch(pattern, url.path)
                if match and self.command in methods.split():
                    # Like the Hub, take slashes of a branch's name as %2F: unquote what was split
                    action(self, *(unquote(part) for part in match.groups()))
                    return
            raise Refused(404, f"this server does not speak {self.command} {self.path}")
        except Refused as refusal:
            headers = {"X-Error-Message": refusal.message, "X-Error-Code": refusal.code}
            self.drain()
            self.answer({"error": refusal.message}, refusal.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def log_message(self, *_):
        pass

    # Requests and answers

    def drain(self):
        """Read what is left of the request: the connection is used again."""
        if not self.body_read:
            self.body()

    def body(self):
        self.body_read = True
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def json(self):
        self.request_log[2] = json.loads(self.body())
        return self.request_log[2]

    def answer(self, content, status=200, headers=None):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(data), **(headers or {})}.items():
            if value is not None:
                self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # Rights

    def role(self):
        authorization = self.headers.get("Authorization")
        if authorization is None:
            return None
        role = TOKENS.get(authorization.removeprefix("Bearer "))
        if role is None:
            raise Refused(401, "Invalid credentials in Authorization header")
        return role

    def needs_write(self):
        role = self.role()
        if role is None:
            raise Refused(401, "Invalid username or password.")
        if role != "write":
            raise Refused(403, "Forbidden: you must use a write token to upload to a repository.")

    def repo(self, repo_id):
        role = self.role()
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and role is None):
            # Anonymous clients learn nothing of private repositories. (The client knows this 401 by the address, but
            # only by one that begins with https; the code tells it here.)
            raise Refused(404 if role else 401, "Repository not found", "RepoNotFound")
        return repo

    def commit_of(self, repo, revision):
        sha = repo.resolve(revision)
        if sha is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    # Repositories

    def create_repo(self):
        self.needs_write()
        wanted = self.json()
        repo_id = f"{wanted['organization'] or 'writer'}/{wanted['name']}"
        url = {"url": f"{self.hub.url}/{repo_id}", "id": repo_id}
        if repo_id in self.hub.repos:
            self.answer(url | {"error": "You already created this model repo"}, 409)
            return
        self.hub.add(repo_id, private=wanted.get("private", wanted.get("visibility") == "private"))
        self.answer(url)

    def create_branch(self, repo_id, branch):
        self.needs_write()
        repo = self.repo(repo_id)
        if branch in repo.refs:
            raise Refused(409, "Reference already exists")
        repo.refs[branch] = repo.refs["main"]
        self.drain()
        self.answer({})

    def repo_info(self, repo_id, revision="main"):
        repo = self.repo(repo_id)
        sha = self.commit_of(repo, revision)
        siblings = [{"rfilename": path} for path in repo.commits[sha]]
        self.answer({"id": repo_id, "sha": sha, "private": repo.private, "siblings": siblings})

    def tree(self, repo_id, revision):
        repo = self.repo(repo_id)
        files = repo.commits[self.commit_of(repo, revision)]
        self.answer([{"type": "file", "path": path} | describe(path, files[path]) for path in files])

    # Uploads

    def validate_card(self):
        content = self.json()["content"]
        valid = re.match(r"---\n.*?\n---\n", content, re.DOTALL)
        errors = [] if valid else [{"message": "the card has no metadata"}]
        self.answer({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, repo_id, revision):
        self.needs_write()
        repo = self.repo(repo_id)
        present = repo.commits[self.commit_of(repo, revision)]
        files = []
        for path in (file["path"] for file in self.json()["files"]):
            mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
            oid = oid_of(path, present[path]) if path in present else None
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer({"files": files})

    def lfs_batch(self, repo_id):
        self.needs_write()
        self.repo(repo_id)
        objects = self.json()["objects"]
        for entry in objects:
            if entry["oid"] not in self.hub.objects:
                entry["actions"] = {
                    "upload": {"href": f"{self.hub.url}/lfs/{entry['oid']}"},
                    "verify": {"href": f"{self.hub.url}/lfs-verify"},
                }
        self.answer({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid):
        with self.hub.lock:
            broken = self.hub.broken_uploads > 0
            self.hub.broken_uploads -= broken
        if broken:
            self.rfile.read(100)
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        content = self.body()
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refused(400, "the content does not have this hash")
        self.hub.objects[oid] = content
        self.answer({})

    def lfs_verify(self):
        wanted = self.json()
        if len(self.hub.objects.get(wanted["oid"], b"")) != wanted["size"]:
            raise Refused(404, "no such object")
        self.answer({})

    def commit(self, repo_id, revision):
        self.needs_write()
        repo = self.repo(repo_id)
        parent = self.commit_of(repo, revision)
        files = self.committed_files([json.loads(line) for line in self.body().splitlines()])
        pull_request = None
        with self.hub.lock:
            if "create_pr" in self.query:
                number = 1 + sum(ref.startswith("refs/pr/") for ref in repo.refs)
                revision, pull_request = f"refs/pr/{number}", f"{self.hub.url}/{repo_id}/discussions/{number}"
            sha = repo.commit(revision, files, parent)
        url = f"{self.hub.url}/{repo_id}/commit/{sha}"
        self.answer({"commitUrl": url, "commitOid": sha, "pullRequestUrl": pull_request})

    def committed_files(self, lines):
        files = {}
        for value in (line["value"] for line in lines if line["key"] != "header"):
            if "content" in value:
                files[value["path"]] = base64.b64decode(value["content"])
            elif value["oid"] in self.hub.objects:
                files[value["path"]] = self.hub.objects[value["oid"]]
            else:
                raise Refused(400, "LFS pointer pointed to a file that does not exist")
        return files

    # Downloads

    def file(self, repo_id, revision, path):
        repo = self.repo(repo_id)
        sha = self.commit_of(repo, revision)
        content = repo.commits[sha].get(path)
        if content is None:
            raise Refused(404, "Entry not found", "EntryNotFound")
        headers = {"X-Repo-Commit": sha, "ETag": f'"{oid_of(path, content)}"'}
        if not path.endswith(LFS_SUFFIXES):
            self.answer(content, headers=headers)
            return
        self.hub.objects[oid_of(path, content)] = content
        headers |= {"X-Linked-ETag": headers["ETag"], "X-Linked-Size": len(content)}
        self.answer(b"", 302, headers | {"Location": f"{self.hub.cdn_url}/cdn/{oid_of(path, content)}"})

    def cdn(self, oid):
        assert "Authorization" not in self.headers, "the client must not send its token to another host"
        self.answer(self.hub.objects[oid])


NAME = r"([^/]+/[^/]+)"
ROUTES = [
    ("POST", "/api/repos/create", Handler.create_repo),
    ("POST", "/api/validate-yaml", Handler.validate_card),
    ("GET", f"/api/models/{NAME}", Handler.repo_info),
    ("GET", f"/api/models/{NAME}/revision/([^/]+)", Handler.repo_info),
    ("GET", f"/api/models/{NAME}/tree/([^/]+)", Handler.tree),
    ("POST", f"/api/models/{NAME}/branch/([^/]+)", Handler.create_branch),
    ("POST", f"/api/models/{NAME}/preupload/([^/]+)", Handler.preupload),
    ("POST", f"/api/models/{NAME}/commit/([^/]+)", Handler.commit),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", "/lfs/([0-9a-f]+)", Handler.lfs_upload),
    ("POST", "/lfs-verify", Handler.lfs_verify),
    ("GET HEAD", f"/{NAME}/resolve/([^/]+)/(.+)", Handler.file),
    ("GET HEAD", "/cdn/([0-9a-f]+)", Handler.cdn),
]


def git_hash(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def oid_of(path, content):
    return hashlib.sha256(content).hexdigest() if path.endswith(LFS_SUFFIXES) else git_hash(content)


def describe(path, content):
    lfs = {"oid": oid_of(path, content), "size": len(content), "pointerSize": 130}
    return {"oid": git_hash(content), "size": len(content)} | ({"lfs": lfs} if path.endswith(LFS_SUFFIXES) else {})
