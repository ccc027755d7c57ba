//! A view against a naive model of the same tree, and its upper against a naive file system.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    os::unix::fs::FileExt as _,
    sync::Arc,
};

use bytes::Bytes;
use hearth::{
    digest::{Digest, ObjectId},
    fs::{
        Body, Change, Contents, FileKind, FsError, Limits, Opened, Owner, ROOT, Shadow, UPPER,
        View, Whole, hub,
    },
    reference::{HubKind, HubRepo},
    tree::{Artifact, Kind, Location, Meta, Object, Recipe, TreeBuilder},
};
use proptest::prelude::*;

struct Data(Arc<File>, u64);

#[async_trait::async_trait]
impl Body for Data {
    fn size(&self) -> u64 {
        self.1
    }
    fn complete(&self) -> Option<Arc<dyn Whole>> {
        Some(self.0.clone())
    }
    fn try_read(&self, offset: u64, buf: &mut [u8]) -> Result<bool, FsError> {
        self.0.read_exact_at(buf, offset).unwrap();
        Ok(true)
    }
    async fn read(self: Arc<Self>, offset: u64, len: usize) -> Result<Bytes, FsError> {
        let mut bytes = vec![0; len];
        self.0.read_exact_at(&mut bytes, offset).unwrap();
        Ok(bytes.into())
    }
    async fn whole(self: Arc<Self>) -> Result<(), FsError> {
        Ok(())
    }
    fn on_wrong(&self, _: Box<dyn Fn() + Send + Sync>) {}
}

struct Bodies(Vec<(Arc<File>, u64)>);

impl Contents for Bodies {
    fn open(&self, object: u32) -> Result<Arc<dyn Body>, FsError> {
        let (file, size) = &self.0[object as usize];
        Ok(Arc::new(Data(file.clone(), *size)))
    }
}

fn object(data: &[u8]) -> Object {
    Object {
        id: ObjectId::Sha256(Digest::of(data)),
        size: data.len() as u64,
        git_sha1: None,
        recipe: Recipe::Raw(Location {
            path: "p".into(),
            generation: None,
            offset: 0,
        }),
    }
}

fn body(data: &[u8]) -> (Arc<File>, u64) {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(data, 0).unwrap();
    (Arc::new(file), data.len() as u64)
}

/// What the model holds at a path.
#[derive(Debug, Clone)]
enum Node {
    Dir,
    /// Content, and which paths share the inode.
    File(Vec<u8>, usize),
    Link(Vec<u8>),
}

#[derive(Debug, Clone)]
enum Add {
    Dir(String),
    File(String, Vec<u8>),
    Link(String, String),
    Hard(String, usize),
}

fn path() -> impl Strategy<Value = String> {
    proptest::collection::vec("[a-c]{1,2}", 1..4).prop_map(|parts| parts.join("/"))
}

fn add() -> impl Strategy<Value = Add> {
    prop_oneof![
        path().prop_map(Add::Dir),
        (path(), proptest::collection::vec(any::<u8>(), 0..200)).prop_map(|(p, d)| Add::File(p, d)),
        (path(), "[a-c/.]{1,9}").prop_map(|(p, t)| Add::Link(p, t)),
        (path(), any::<usize>()).prop_map(|(p, n)| Add::Hard(p, n)),
    ]
}

type Made = (BTreeMap<String, Node>, Artifact, Vec<(Arc<File>, u64)>);

/// Builds the tree and its model from those additions that the builder takes.
fn build(adds: &[Add]) -> Made {
    let mut builder = TreeBuilder::new(Meta::dir(7));
    let mut model = BTreeMap::new();
    let (mut objects, mut bodies, mut inodes) = (vec![], vec![], vec![]);
    for add in adds {
        let (path, node) = match add {
            Add::Dir(path) => {
                let kind = Kind::Dir {
                    parent: 0,
                    entries: vec![],
                };
                let added = builder.add(path.as_bytes(), kind, Meta::dir(7));
                (path, added.ok().map(|_| Node::Dir))
            }
            Add::File(path, data) => {
                let number = objects.len() as u32;
                let added = builder.add_file(path.as_bytes(), number, Meta::file(9));
                let node = added.ok().map(|inode| {
                    objects.push(object(data));
                    bodies.push(body(data));
                    inodes.push((inode, data.clone()));
                    Node::File(data.clone(), inodes.len() - 1)
                });
                (path, node)
            }
            Add::Link(path, target) => {
                let kind = Kind::Symlink {
                    target: target.as_bytes().into(),
                };
                let added = builder.add(path.as_bytes(), kind, Meta::file(9));
                (path, added.ok().map(|_| Node::Link(target.clone().into())))
            }
            Add::Hard(path, which) if !inodes.is_empty() => {
                let which = which % inodes.len();
                let (inode, data) = &inodes[which];
                let added = builder.link(path.as_bytes(), *inode);
                (path, added.ok().map(|()| Node::File(data.clone(), which)))
            }
            Add::Hard(..) => continue,
        };
        // The builder makes missing parents even where the last step is refused.
        let mut at = 0;
        while let Some(slash) = path[at..].find('/') {
            let parent = &path[..at + slash];
            match model.get(parent) {
                None => model.insert(parent.to_owned(), Node::Dir),
                Some(Node::Dir) => None,
                Some(_) => break,
            };
            at += slash + 1;
        }
        if let Some(node) = node {
            model.insert(path.clone(), node);
        }
    }
    let artifact = Artifact {
        reference: "file:///x".into(),
        revision: String::new(),
        tree: builder.build(),
        objects,
    };
    (model, artifact, bodies)
}

/// All names of a directory, read `step` at a time.
fn list(view: &View, ino: u64, step: usize) -> Vec<(Vec<u8>, u64)> {
    let (mut names, mut offset) = (vec![], 0);
    loop {
        let mut got = 0;
        view.readdir(ino, offset, &mut |entry| {
            if got == step {
                return false;
            }
            got += 1;
            offset = entry.next;
            names.push((entry.name.to_vec(), entry.attr.ino));
            true
        })
        .unwrap();
        if got == 0 {
            return names;
        }
    }
}

fn children<'m>(model: &'m BTreeMap<String, Node>, dir: &str) -> Vec<(&'m str, &'m Node)> {
    let prefix = match dir {
        "" => String::new(),
        dir => format!("{dir}/"),
    };
    model
        .iter()
        .filter_map(|(path, node)| Some((path.strip_prefix(&prefix)?, node)))
        .filter(|(name, _)| !name.contains('/'))
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn a_view_is_its_tree(
        adds in proptest::collection::vec(add(), 0..40),
        step in 1usize..5,
        range in (0u64..220, 0usize..220),
    ) {
        let (model, artifact, bodies) = build(&adds);
        let view = View::new(Arc::new(artifact), Arc::new(Bodies(bodies))).unwrap();
        let mut inos = BTreeMap::from([(String::new(), ROOT)]);
        for (path, node) in &model {
            let (dir, name) = path.rsplit_once('/').unwrap_or(("", path));
            let attr = view.lookup(inos[dir], name.as_bytes()).unwrap();
            prop_assert_eq!(view.attr(attr.ino).unwrap(), attr);
            inos.insert(path.clone(), attr.ino);
            match node {
                Node::Dir => {
                    let dirs = children(&model, path).iter().filter(|(_, n)| matches!(n, Node::Dir)).count();
                    prop_assert_eq!((attr.kind, attr.nlink as usize), (FileKind::Dir, 2 + dirs));
                    prop_assert_eq!(view.open(attr.ino, false).err(), Some(FsError::IsDir));
                }
                Node::Link(target) => {
                    prop_assert_eq!(attr.kind, FileKind::Symlink);
                    prop_assert_eq!(view.readlink(attr.ino).unwrap(), &target[..]);
                    prop_assert_eq!(attr.size as usize, target.len());
                }
                Node::File(data, which) => {
                    let same = model.values().filter(|n| matches!(n, Node::File(_, w) if w == which));
                    prop_assert_eq!(attr.nlink as usize, same.count());
                    prop_assert_eq!(attr.size as usize, data.len());
                    let Ok(Opened::Body(body)) = view.open(attr.ino, false) else {
                        panic!("a file opens");
                    };
                    let start = (range.0 as usize).min(data.len());
                    let end = (start + range.1).min(data.len());
                    let mut got = vec![0; end - start];
                    prop_assert!(body.try_read(start as u64, &mut got).unwrap());
                    prop_assert_eq!(&got[..], &data[start..end]);
                    prop_assert_eq!(view.open(attr.ino, true).err(), Some(FsError::ReadOnly));
                    prop_assert_eq!(view.lookup(attr.ino, b"x").err(), Some(FsError::NotDir));
                }
            }
        }
        for (path, ino) in &inos {
            if path.is_empty() || matches!(model[path], Node::Dir) {
                let mut want = vec![(b".".to_vec(), *ino)];
                let parent = path.rsplit_once('/').map_or("", |(parent, _)| parent);
                want.push((b"..".to_vec(), inos[parent]));
                for (name, _) in children(&model, path) {
                    let child = if path.is_empty() { name.to_owned() } else { format!("{path}/{name}") };
                    want.push((name.into(), inos[&child]));
                }
                prop_assert_eq!(list(&view, *ino, step), want);
                prop_assert_eq!(view.lookup(*ino, b"zz").err(), Some(FsError::NotFound));
            }
        }
        let files: BTreeSet<_> = inos.values().collect();
        prop_assert_eq!(view.statfs().files as usize, files.len());
    }
}

#[derive(Debug, Clone)]
enum Op {
    Create(String),
    Mkdir(String),
    Write(String, u64, Vec<u8>),
    Truncate(String, u64),
    Unlink(String),
    Rmdir(String),
    Rename(String, String, bool),
}

fn op() -> impl Strategy<Value = Op> {
    let path = || {
        proptest::sample::select(vec![
            "w", "w/a", "w/b", "w/a/b", "w/b/c", "v", "tree/x", "u",
        ])
    };
    let data = || proptest::collection::vec(any::<u8>(), 0..300);
    prop_oneof![
        path().prop_map(|p| Op::Create(p.into())),
        path().prop_map(|p| Op::Mkdir(p.into())),
        (path(), 0u64..900, data()).prop_map(|(p, o, d)| Op::Write(p.into(), o, d)),
        (path(), 0u64..1200).prop_map(|(p, s)| Op::Truncate(p.into(), s)),
        path().prop_map(|p| Op::Unlink(p.into())),
        path().prop_map(|p| Op::Rmdir(p.into())),
        (path(), path(), any::<bool>()).prop_map(|(a, b, k)| Op::Rename(a.into(), b.into(), k)),
    ]
}

const BYTES: u64 = 1000;
const INODES: u64 = 6;

/// The naive upper: path -> content, `None` for a directory. `w` and `v` may be made in the root.
#[derive(Debug, Clone, Default)]
struct Model(BTreeMap<String, Option<Vec<u8>>>);

impl Model {
    fn bytes(&self) -> u64 {
        self.0.values().flatten().map(|d| d.len() as u64).sum()
    }

    fn has_children(&self, path: &str) -> bool {
        let prefix = format!("{path}/");
        self.0.keys().any(|p| p.starts_with(&prefix))
    }

    fn makes(&self, path: &str) -> bool {
        let parent = path.rsplit_once('/').map(|(parent, _)| parent);
        let allowed = match parent {
            None => path == "w" || path == "v",
            Some(parent) => self.0.get(parent) == Some(&None),
        };
        // The shadow itself is an inode.
        allowed && !self.0.contains_key(path) && (self.0.len() as u64) + 1 < INODES
    }

    fn resize(&mut self, path: &str, size: u64) -> bool {
        let bytes = self.bytes();
        let Some(Some(data)) = self.0.get_mut(path) else {
            return false;
        };
        let old = data.len() as u64;
        if size > old && bytes - old + size > BYTES {
            return false;
        }
        data.resize(size as usize, 0);
        true
    }

    /// Does `op`, and says whether it may be done.
    fn apply(&mut self, op: &Op) -> bool {
        match op {
            Op::Create(p) | Op::Mkdir(p) => {
                let makes = self.makes(p);
                if makes {
                    let data = matches!(op, Op::Create(_)).then(Vec::new);
                    self.0.insert(p.clone(), data);
                }
                makes
            }
            Op::Write(p, offset, data) => {
                let end = offset + data.len() as u64;
                let Some(Some(old)) = self.0.get(p) else {
                    return false;
                };
                let grows = end > old.len() as u64;
                if grows && !self.resize(p, end) {
                    return false;
                }
                if let Some(Some(old)) = self.0.get_mut(p) {
                    old[*offset as usize..end as usize].copy_from_slice(data);
                }
                true
            }
            Op::Truncate(p, size) => self.resize(p, *size),
            Op::Unlink(p) => matches!(self.0.get(p), Some(Some(_))) && self.0.remove(p).is_some(),
            Op::Rmdir(p) => {
                self.0.get(p) == Some(&None) && !self.has_children(p) && self.0.remove(p).is_some()
            }
            Op::Rename(a, b, keep) => {
                let Some(what) = self.0.get(a).cloned() else {
                    return false;
                };
                let parent = b.rsplit_once('/').map(|(parent, _)| parent);
                let allowed = match parent {
                    None => b == "w" || b == "v",
                    Some(parent) => self.0.get(parent) == Some(&None),
                };
                let over = self.0.get(b);
                let fits = match (&what, over) {
                    (_, None) => true,
                    (_, Some(_)) if *keep => false,
                    _ if a == b => true,
                    (Some(_), Some(Some(_))) => true,
                    (None, Some(None)) => !self.has_children(b),
                    _ => false,
                };
                if !allowed || !fits {
                    return false;
                }
                if a != b {
                    let prefix = format!("{a}/");
                    self.0.remove(b);
                    let moved: Vec<_> = self
                        .0
                        .keys()
                        .filter(|p| *p == a || p.starts_with(&prefix))
                        .cloned()
                        .collect();
                    for path in moved {
                        let node = self.0.remove(&path).unwrap();
                        self.0.insert(path.replacen(a, b, 1), node);
                    }
                }
                true
            }
        }
    }
}

/// The inode of the directory of `path`, if there is one, and the last name.
fn walk<'p>(view: &View, path: &'p str) -> Option<(u64, &'p [u8])> {
    let (dirs, name) = path.rsplit_once('/').unwrap_or(("", path));
    let mut ino = ROOT;
    for part in dirs.split('/').filter(|p| !p.is_empty()) {
        ino = view.lookup(ino, part.as_bytes()).ok()?.ino;
    }
    Some((ino, name.as_bytes()))
}

fn perform(view: &View, op: &Op) -> Result<(), FsError> {
    let owner = Owner { uid: 1, gid: 2 };
    let find = |path: &str| {
        let (dir, name) = walk(view, path).ok_or(FsError::NotFound)?;
        view.lookup(dir, name).map(|attr| attr.ino)
    };
    match op {
        Op::Create(p) => {
            let (dir, name) = walk(view, p).ok_or(FsError::NotFound)?;
            let attr = view.create(dir, name, 0o644, owner)?;
            assert_eq!((attr.mode, attr.uid, attr.gid), (0o644, 1, 2));
            view.release(attr.ino);
            Ok(())
        }
        Op::Mkdir(p) => {
            let (dir, name) = walk(view, p).ok_or(FsError::NotFound)?;
            view.mkdir(dir, name, 0o755, owner).map(drop)
        }
        Op::Write(p, offset, data) => view.write(find(p)?, *offset, data),
        Op::Truncate(p, size) => {
            let change = Change {
                size: Some(*size),
                ..Change::default()
            };
            view.setattr(find(p)?, &change).map(drop)
        }
        Op::Unlink(p) => {
            let (dir, name) = walk(view, p).ok_or(FsError::NotFound)?;
            view.unlink(dir, name)
        }
        Op::Rmdir(p) => {
            let (dir, name) = walk(view, p).ok_or(FsError::NotFound)?;
            view.rmdir(dir, name)
        }
        Op::Rename(a, b, keep) => {
            let from = walk(view, a).ok_or(FsError::NotFound)?;
            let to = walk(view, b).ok_or(FsError::NotFound)?;
            view.rename(from, to, *keep)
        }
    }
}

fn snapshot(view: &View, ino: u64, path: &str, found: &mut BTreeMap<String, Option<Vec<u8>>>) {
    for (name, child) in list(view, ino, 2).into_iter().skip(2) {
        let name = String::from_utf8(name).unwrap();
        let path = if path.is_empty() {
            name
        } else {
            format!("{path}/{name}")
        };
        if child < UPPER {
            continue;
        }
        let attr = view.attr(child).unwrap();
        if attr.kind == FileKind::Dir {
            assert_eq!(list(view, child, 9)[1].1, ino, "what .. shows in {path}");
            found.insert(path.clone(), None);
            snapshot(view, child, &path, found);
        } else {
            let data = view.read_upper(child, 0, 1 << 20).unwrap();
            assert_eq!(data.len() as u64, attr.size);
            found.insert(path, Some(data));
        }
    }
}

fn shadowed(limits: Limits) -> View {
    let mut builder = TreeBuilder::new(Meta::dir(7));
    builder.add_file(b"tree/x", 0, Meta::file(9)).unwrap();
    let artifact = Artifact {
        reference: "file:///x".into(),
        revision: String::new(),
        tree: builder.build(),
        objects: vec![object(b"data")],
    };
    let shadow = Shadow {
        dir: 0,
        names: vec![b"w"[..].into(), b"v"[..].into()],
        files: vec![],
        dirs: vec![],
    };
    let contents = Arc::new(Bodies(vec![body(b"data")]));
    View::with_upper(Arc::new(artifact), contents, &[shadow], limits).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn the_upper_is_a_small_file_system(ops in proptest::collection::vec(op(), 0..60)) {
        let view = shadowed(Limits { bytes: BYTES, inodes: INODES });
        let mut model = Model::default();
        for op in &ops {
            // What the kernel rules out before it asks.
            if let Op::Rename(a, b, _) = op
                && (b.starts_with(&format!("{a}/")) || a.starts_with(&format!("{b}/")))
            {
                continue;
            }
            let (did, may) = (perform(&view, op), model.apply(op));
            prop_assert_eq!(did.is_ok(), may, "{:?}: {:?}", op, did);
            let mut found = BTreeMap::new();
            snapshot(&view, ROOT, "", &mut found);
            prop_assert_eq!(&found, &model.0);
            let free = view.statfs();
            prop_assert_eq!(free.free_files, INODES - 1 - model.0.len() as u64);
        }
    }
}

#[test]
fn unlinked_files_live_until_they_are_released() {
    let view = shadowed(Limits {
        bytes: 10,
        inodes: 3,
    });
    let owner = Owner { uid: 0, gid: 0 };
    let file = view.create(ROOT, b"w", 0o600, owner).unwrap();
    view.write(file.ino, 0, b"0123456789").unwrap();
    view.unlink(ROOT, b"w").unwrap();
    assert_eq!(view.attr(file.ino).unwrap().nlink, 0);
    assert_eq!(view.read_upper(file.ino, 4, 99).unwrap(), b"456789");
    let other = view.create(ROOT, b"v", 0o600, owner).unwrap();
    assert_eq!(view.write(other.ino, 0, b"x"), Err(FsError::Full));
    view.release(file.ino);
    assert_eq!(view.attr(file.ino), Err(FsError::Stale));
    view.write(other.ino, 0, b"x").unwrap();
    assert_eq!(view.write(other.ino, u64::MAX, b"xx"), Err(FsError::Full));
    assert_eq!(view.write(other.ino, 10, b"x"), Err(FsError::Full));
}

#[test]
fn names_made_or_removed_while_a_directory_is_read_disturb_no_others() {
    let view = shadowed(Limits::default());
    let owner = Owner { uid: 0, gid: 0 };
    let dir = view.mkdir(ROOT, b"w", 0o700, owner).unwrap().ino;
    for name in [b"a", b"b", b"c", b"d"] {
        view.create(dir, name, 0o600, owner).unwrap();
    }
    let (mut seen, mut offset) = (vec![], 0);
    for round in 0.. {
        let before = seen.len();
        view.readdir(dir, offset, &mut |entry| {
            if seen.len() > before {
                return false;
            }
            seen.push(entry.name.to_vec());
            offset = entry.next;
            true
        })
        .unwrap();
        if seen.len() == before {
            break;
        }
        match round {
            2 => view.unlink(dir, b"a").unwrap(),
            3 => view.create(dir, b"e", 0o600, owner).map(drop).unwrap(),
            _ => {}
        }
    }
    assert_eq!(seen.concat(), b"...abcde");
}

#[test]
fn a_tree_that_contradicts_itself_is_refused() {
    let mut builder = TreeBuilder::new(Meta::dir(0));
    builder.add_file(b"f", 3, Meta::file(0)).unwrap();
    let artifact = Artifact {
        reference: "file:///x".into(),
        revision: String::new(),
        tree: builder.build(),
        objects: vec![],
    };
    let result = View::new(Arc::new(artifact), Arc::new(Bodies(vec![])));
    assert!(matches!(result.err(), Some(FsError::Damaged(_))));
}

#[test]
fn the_hub_layout_names_blobs_by_etag() {
    let mut builder = TreeBuilder::new(Meta::dir(5));
    builder.add_file(b"a/b.bin", 0, Meta::file(6)).unwrap();
    builder.add_file(b"c.json", 1, Meta::file(6)).unwrap();
    let mut small = object(b"{}");
    small.git_sha1 = Some([0xab; 20]);
    let artifact = Artifact {
        reference: "hf://datasets/org/name@v1/sub".into(),
        revision: "c0ffee".into(),
        tree: builder.build(),
        objects: vec![object(b"weights"), small],
    };
    let mut repo = HubRepo {
        kind: HubKind::Dataset,
        id: "org/name".into(),
        revision: Some("refs/pr/1".into()),
        path: "sub".into(),
    };
    let layout = hub::layout(&artifact, &repo, "sub").unwrap();
    let tree = &layout.artifact.tree;
    let top = "datasets--org--name";
    let blob = Digest::of(b"weights").hex();
    let link = tree.find(&format!("{top}/snapshots/c0ffee/sub/a/b.bin"));
    let Kind::Symlink { target } = &tree.get(link.unwrap()).unwrap().kind else {
        panic!("snapshots hold links");
    };
    assert_eq!(**target, *format!("../../../../blobs/{blob}").as_bytes());
    let small = tree.find(&format!("{top}/blobs/{}", "ab".repeat(20)));
    assert_eq!(
        tree.get(small.unwrap()).unwrap().kind,
        Kind::File { object: 1 }
    );
    assert_eq!(
        layout.shadows[1].files,
        [("refs/refs/pr/1".to_owned(), b"c0ffee".to_vec())]
    );
    for bad in ["../x", "a//b", "", "/x"] {
        repo.revision = Some(bad.into());
        assert!(hub::layout(&artifact, &repo, "").is_err(), "{bad}");
    }
    repo.revision = None;
    assert!(hub::layout(&artifact, &repo, "../x").is_err());
}

#[test]
fn a_single_file_of_a_repository_keeps_its_place_in_the_hub_layout() {
    let mut builder = TreeBuilder::new(Meta::dir(5));
    builder.add_file(b"b.bin", 0, Meta::file(6)).unwrap();
    let mut only = object(b"weights");
    let Recipe::Raw(location) = &mut only.recipe else {
        panic!("it is no slice");
    };
    location.path = "sub/b.bin".into();
    let artifact = Artifact {
        reference: "hf://org/name/sub/b.bin".into(),
        revision: "c0ffee".into(),
        tree: builder.build(),
        objects: vec![only],
    };
    let repo = HubRepo {
        kind: HubKind::Model,
        id: "org/name".into(),
        revision: None,
        path: "sub/b.bin".into(),
    };
    let layout = hub::layout(&artifact, &repo, &repo.path).unwrap();
    let snapshot = "models--org--name/snapshots/c0ffee";
    let found = layout.artifact.tree.find(&format!("{snapshot}/sub/b.bin"));
    let inode = layout.artifact.tree.get(found.unwrap()).unwrap();
    assert!(matches!(inode.kind, Kind::Symlink { .. }));
}
