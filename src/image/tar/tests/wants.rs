//! Members of all kinds and styles, and how they are written.

use proptest::prelude::*;

use super::super::{
    BLOCK, Member, MemberKind, sparse,
    write::{Put, Writer, number},
};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Style {
    Ustar,
    Gnu,
    Pax,
    Pax00,
    Pax01,
    Pax10,
}

#[derive(Debug, Clone)]
pub(super) struct Want {
    kind: MemberKind,
    style: Style,
    path: Vec<u8>,
    target: Vec<u8>,
    mode: u16,
    uid: u32,
    gid: u32,
    mtime: (i64, u32),
    device: (u32, u32),
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Of a file: how long each hole and each piece of data after it are.
    runs: Vec<(u16, u16)>,
    sparse: bool,
}

fn name() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        proptest::collection::vec(1u8.., 1..90),
        proptest::collection::vec(1u8.., 101..400),
    ]
}

pub(super) fn wants() -> impl Strategy<Value = Vec<Want>> {
    use MemberKind::*;
    let kind = prop_oneof![
        4 => Just(File), 1 => Just(Dir), 1 => Just(Symlink), 1 => Just(Hardlink),
        1 => Just(Char), 1 => Just(Block), 1 => Just(Fifo)
    ];
    let style = prop_oneof![
        Just(Style::Ustar),
        Just(Style::Gnu),
        Just(Style::Pax),
        Just(Style::Pax00),
        Just(Style::Pax01),
        Just(Style::Pax10)
    ];
    let xattr = (name(), proptest::collection::vec(any::<u8>(), 0..40));
    let want = (
        (kind, style, name(), name(), 0u16..0o10000, any::<bool>()),
        any::<(u32, u32, i32, u32, u32)>(),
        (0u32..1_000_000_000, proptest::collection::vec(xattr, 0..3)),
        proptest::collection::vec((0u16..3000, 0u16..3000), 0..30),
    );
    let want = want.prop_map(
        |((kind, style, path, target, mode, sparse), n, (nanos, xattrs), runs)| Want {
            kind,
            style,
            path,
            target,
            mode,
            uid: n.0,
            gid: n.1,
            mtime: (n.2.into(), nanos),
            device: (n.3, n.4),
            xattrs,
            runs,
            sparse,
        },
    );
    proptest::collection::vec(want, 0..12)
}

impl Want {
    /// The content, the map and the data in the map.
    pub(super) fn content(&self) -> (Vec<u8>, Vec<(u64, u64)>, Vec<u8>) {
        let (mut content, mut map, mut data) = (Vec::new(), Vec::new(), Vec::new());
        for (at, &(hole, len)) in self.runs.iter().enumerate() {
            let hole = if self.sparse { hole } else { 0 };
            content.resize(content.len() + usize::from(hole), 0);
            map.push((content.len() as u64, u64::from(len)));
            let piece: Vec<u8> = (0..len)
                .map(|n| (n as u8).wrapping_mul(7) ^ at as u8)
                .collect();
            content.extend_from_slice(&piece);
            data.extend_from_slice(&piece);
        }
        (content, map, data)
    }

    /// Brings the wish to what its style can say.
    pub(super) fn settle(&mut self) {
        let pax = !matches!(self.style, Style::Ustar | Style::Gnu);
        let link = matches!(self.kind, MemberKind::Symlink | MemberKind::Hardlink);
        let is_file = self.kind == MemberKind::File;
        if !link {
            self.target.clear();
        }
        if !matches!(self.kind, MemberKind::Char | MemberKind::Block) {
            self.device = (0, 0);
        }
        if !is_file {
            self.runs.clear();
            self.sparse = false;
        }
        if !pax {
            self.xattrs.clear();
            self.mtime.1 = 0;
        }
        match self.style {
            Style::Ustar => {
                self.path.truncate(100);
                self.target.truncate(100);
                self.sparse = false;
            }
            Style::Pax => self.sparse = false,
            Style::Pax00 | Style::Pax01 | Style::Pax10 => self.sparse = is_file,
            Style::Gnu => {}
        }
        self.xattrs.sort();
        self.xattrs.dedup_by(|a, b| a.0 == b.0);
        self.xattrs.retain(|(name, _)| !name.contains(&b'='));
    }

    pub(super) fn write(&self, out: &mut Writer) -> Member {
        let (content, map, data) = self.content();
        let (seconds, nanos) = self.mtime;
        let mut stored = data.clone();
        let mut records: Vec<(Vec<u8>, Vec<u8>)> = Vec::new();
        let mut add = |key: &str, value: Vec<u8>| records.push((key.into(), value));
        let text = |n: u64| n.to_string().into_bytes();
        let pax = !matches!(self.style, Style::Ustar | Style::Gnu);
        if pax {
            add("path", self.path.clone());
            add("linkpath", self.target.clone());
            add("uid", text(self.uid.into()));
            add("gid", text(self.gid.into()));
            let time = match (seconds, nanos) {
                (..0, 1..) => format!("-{}.{:09}", -(seconds + 1), 1_000_000_000 - nanos),
                _ => format!("{seconds}.{nanos:09}"),
            };
            add("mtime", time.into_bytes());
            for (name, value) in &self.xattrs {
                records.push(([&b"SCHILY.xattr."[..], name].concat(), value.clone()));
            }
        }
        let mut add = |key: &str, value: Vec<u8>| records.push((key.into(), value));
        if self.sparse && pax {
            let numbers = map.iter().flat_map(|&(start, len)| [start, len]);
            let name = b"GNUSparseFile.0/x".to_vec();
            match self.style {
                Style::Pax00 => {
                    add("GNU.sparse.size", text(content.len() as u64));
                    add("GNU.sparse.numblocks", text(map.len() as u64));
                    for &(start, len) in &map {
                        add("GNU.sparse.offset", text(start));
                        add("GNU.sparse.numbytes", text(len));
                    }
                    if map.is_empty() {
                        add("GNU.sparse.major", b"0".to_vec());
                        add("GNU.sparse.minor", b"0".to_vec());
                    }
                }
                Style::Pax01 => {
                    add("path", name);
                    add("GNU.sparse.name", self.path.clone());
                    add("GNU.sparse.major", b"0".to_vec());
                    add("GNU.sparse.minor", b"1".to_vec());
                    add("GNU.sparse.size", text(content.len() as u64));
                    add("GNU.sparse.numblocks", text(map.len() as u64));
                    let map: Vec<_> = numbers.map(|n| n.to_string()).collect();
                    add("GNU.sparse.map", map.join(",").into_bytes());
                }
                _ => {
                    add("path", name);
                    add("GNU.sparse.name", self.path.clone());
                    add("GNU.sparse.major", b"1".to_vec());
                    add("GNU.sparse.minor", b"0".to_vec());
                    add("GNU.sparse.realsize", text(content.len() as u64));
                    stored = format!("{}\n", map.len()).into_bytes();
                    for number in numbers {
                        stored.extend_from_slice(format!("{number}\n").as_bytes());
                    }
                    stored.resize(stored.len().next_multiple_of(BLOCK), 0);
                    stored.extend_from_slice(&data);
                }
            }
        }
        if pax {
            let records: Vec<_> = records.iter().map(|(k, v)| (&k[..], &v[..])).collect();
            out.pax(&records);
        } else if self.style == Style::Gnu {
            if self.path.len() > 100 {
                out.long(b'L', &self.path);
            }
            if self.target.len() > 100 {
                out.long(b'K', &self.target);
            }
        }
        let gnu = self.style == Style::Gnu;
        let put = Put {
            flag: match self.kind {
                MemberKind::File if self.sparse && gnu => b'S',
                MemberKind::File => b'0',
                MemberKind::Hardlink => b'1',
                MemberKind::Symlink => b'2',
                MemberKind::Char => b'3',
                MemberKind::Block => b'4',
                MemberKind::Dir => b'5',
                MemberKind::Fifo => b'6',
            },
            // What a PAX header says counts, not this.
            name: if pax { b"x" } else { &self.path },
            target: if pax { b"y" } else { &self.target },
            mode: self.mode.into(),
            uid: if pax { 1 } else { self.uid.into() },
            gid: if pax { 1 } else { self.gid.into() },
            mtime: if pax { 1 } else { seconds },
            device: self.device,
            data: &stored,
            gnu,
        };
        if put.flag == b'S' {
            old_sparse(out, &put, &map, content.len() as u64);
        } else {
            out.put(&put);
        }
        let padding = data.len().next_multiple_of(BLOCK) - data.len();
        let target = match (pax, self.target.is_empty()) {
            (true, true) => b"y".to_vec(),
            _ => self.target.clone(),
        };
        Member {
            kind: self.kind,
            path: self.path.clone(),
            target,
            mode: self.mode,
            uid: self.uid,
            gid: self.gid,
            mtime: self.mtime,
            major: self.device.0,
            minor: self.device.1,
            xattrs: self
                .xattrs
                .iter()
                .map(|(name, value)| (name[..].into(), value[..].into()))
                .collect(),
            size: content.len() as u64,
            offset: (out.0.len() - data.len() - padding) as u64,
            pieces: match self.sparse {
                true => sparse::check(map, content.len() as u64, data.len() as u64).unwrap(),
                false => Vec::new(),
            },
        }
    }
}

fn old_sparse(out: &mut Writer, put: &Put<'_>, map: &[(u64, u64)], size: u64) {
    let entries = |into: &mut [u8], map: &[(u64, u64)]| {
        for (field, piece) in into.chunks_exact_mut(24).zip(map) {
            number(&mut field[..12], piece.0 as i64);
            number(&mut field[12..], piece.1 as i64);
        }
    };
    let (first, mut rest) = map.split_at(map.len().min(4));
    let data = put.data;
    out.put_with(
        &Put {
            data: b"",
            ..put.clone()
        },
        |block| {
            number(&mut block[124..136], data.len() as i64);
            entries(&mut block[386..482], first);
            block[482] = (!rest.is_empty()).into();
            number(&mut block[483..495], size as i64);
        },
    );
    while !rest.is_empty() {
        let (some, after) = rest.split_at(rest.len().min(21));
        rest = after;
        let mut block = [0; BLOCK];
        entries(&mut block[..504], some);
        block[504] = (!rest.is_empty()).into();
        out.0.extend_from_slice(&block);
    }
    out.data(data);
}
