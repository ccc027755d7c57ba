//! The members of an uncompressed tar, from its headers alone.
//!
//! A [`TarWalk`] does no I/O: it says which bytes it wants next and takes them. It skips the content
//! of members, so that a tar of a few large files costs a few small reads. What it allocates is
//! bounded by the number of members it may find and by [`MAX_EXTENSION`].
//!
//! Formats: POSIX.1-1988 (ustar) and POSIX.1-2001 (pax) as in
//! <https://pubs.opengroup.org/onlinepubs/9799919799/utilities/pax.html>, GNU as in
//! <https://www.gnu.org/software/tar/manual/html_node/Standard.html>.

use std::ops::Range;

use crate::tree::MAX_PATH;

const BLOCK: u64 = 512;
/// Bytes of a first look, and after a long jump.
const SHORT_LOOK: u64 = 64 << 10;
/// Bytes of a look where headers follow each other closely.
const LONG_LOOK: u64 = 4 << 20;
/// Most looks at one tar.
const MAX_LOOKS: usize = 10_000;
/// Most bytes looked at in one tar.
const MAX_LOOKED_AT: u64 = 256 << 20;
/// Longest name or set of pax records, in bytes.
const MAX_EXTENSION: u64 = 1 << 20;

/// Why a tar cannot be walked.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum TarError {
    #[error("the tar is damaged at byte {at}: {why}")]
    Damaged { at: u64, why: &'static str },
    #[error("the tar has {path:?} at byte {at}, {why}")]
    Member {
        at: u64,
        path: String,
        why: &'static str,
    },
    #[error("the tar has {path:?} at byte {at}, a sparse file, which cannot be read in place")]
    Sparse { at: u64, path: String },
    #[error("the tar has more than {0} members")]
    TooMany(usize),
    #[error("the tar has too many or too scattered members to be read in place")]
    TooScattered,
}

impl TarError {
    /// Whether the tar may be good for all that: who reads all of it can have its files.
    pub(crate) const fn is_of_place(&self) -> bool {
        matches!(
            self,
            Self::Sparse { .. } | Self::TooMany(_) | Self::TooScattered
        )
    }
}

/// One member of a tar.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Member {
    /// Without leading `./` and trailing slash; empty for the root. Untrusted: may still hold `..`.
    pub(crate) path: String,
    pub(crate) kind: MemberKind,
    /// Permission bits.
    pub(crate) mode: u32,
    /// Seconds since the epoch.
    pub(crate) mtime: i64,
}

/// What a member is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum MemberKind {
    Dir,
    /// A file: its content is bytes `offset..offset + size` of the tar.
    File {
        offset: u64,
        size: u64,
    },
    Symlink {
        target: String,
    },
    /// Another name of the file at `target`, a path like [`Member::path`].
    Hardlink {
        target: String,
    },
}

/// A walk over the headers of one tar.
#[derive(Debug)]
pub(crate) struct TarWalk {
    /// Bytes of the tar.
    size: u64,
    /// Where the next header, or the data of an extension, starts.
    at: u64,
    /// The extension whose data is at `at`: its kind and its bytes.
    extension: Option<(u8, u64)>,
    next: Extensions,
    members: Vec<Member>,
    most: usize,
    look: u64,
    looks: usize,
    looked_at: u64,
    done: bool,
}

/// What extension headers say of the member that follows.
#[derive(Debug, Default)]
struct Extensions {
    path: Option<Vec<u8>>,
    target: Option<Vec<u8>>,
    size: Option<u64>,
    mtime: Option<i64>,
}

impl TarWalk {
    /// A walk over a tar of `size` bytes that may have `most` members.
    pub(crate) fn new(size: u64, most: usize) -> Self {
        Self {
            // So that no sum of positions can overflow.
            size: size.min(i64::MAX as u64),
            at: 0,
            extension: None,
            next: Extensions::default(),
            members: Vec::new(),
            most,
            look: SHORT_LOOK,
            looks: 0,
            looked_at: 0,
            done: size == 0,
        }
    }

    /// The bytes that are wanted next, never none; `None` once all members are known.
    ///
    /// # Errors
    /// A tar that would take too many reads.
    pub(crate) fn wants(&mut self) -> Result<Option<Range<u64>>, TarError> {
        if self.done {
            return Ok(None);
        }
        let end = self.at.saturating_add(self.look.max(self.needed()));
        let range = self.at..end.min(self.size);
        self.looks += 1;
        self.looked_at += range.end - range.start;
        if self.looks > MAX_LOOKS || self.looked_at > MAX_LOOKED_AT {
            return Err(TarError::TooScattered);
        }
        Ok(Some(range))
    }

    /// Takes the bytes that [`TarWalk::wants`] asked for.
    ///
    /// # Errors
    /// What is no tar, and members that are no files, directories or links.
    pub(crate) fn take(&mut self, bytes: &[u8]) -> Result<(), TarError> {
        let start = self.at;
        let compressed = matches!(bytes, [0x1f, 0x8b, ..] | [0x28, 0xb5, 0x2f, 0xfd, ..]);
        if start == 0 && compressed {
            return Err(self.damaged("it is compressed, which its media type does not say"));
        }
        let end = start + bytes.len() as u64;
        while !self.done && self.at.saturating_add(self.needed()) <= end {
            let rest = &bytes[(self.at - start) as usize..];
            let (now, _) = rest.split_at(self.needed() as usize);
            self.step(now)?;
        }
        if self.done {
            return Ok(());
        }
        if self.at == start {
            return Err(self.damaged("it is cut short"));
        }
        let gap = self.at.saturating_sub(end);
        self.look = match gap <= self.look {
            true => (self.look * 2).min(LONG_LOOK),
            false => SHORT_LOOK,
        };
        Ok(())
    }

    /// The members, in the order of the tar, once nothing more is wanted.
    pub(crate) fn members(self) -> Vec<Member> {
        self.members
    }

    /// Bytes at `at` without which there is no step.
    fn needed(&self) -> u64 {
        match self.extension {
            Some((_, len)) => len.next_multiple_of(BLOCK),
            None => BLOCK,
        }
    }

    /// Takes one header or the data of one extension.
    fn step(&mut self, bytes: &[u8]) -> Result<(), TarError> {
        if let Some((kind, len)) = self.extension.take() {
            self.extend(kind, &bytes[..len as usize])?;
            return self.go_on(bytes.len() as u64);
        }
        if bytes.iter().all(|&b| b == 0) {
            self.done = true;
            return Ok(());
        }
        let header = Header(bytes);
        if !header.checksum_fits() {
            return Err(self.damaged("the checksum of a header does not fit"));
        }
        let kind = header.kind();
        let size = self.number(header.field(124, 12), "a size is no number")?;
        match kind {
            b'x' | b'L' | b'K' | b'g' => {
                if size == 0 || size > MAX_EXTENSION {
                    return Err(self.damaged("an extension header is empty or too long"));
                }
                self.extension = Some((kind, size));
                self.go_on(BLOCK)
            }
            // The label of a GNU volume.
            b'V' => self.go_on(BLOCK),
            _ => self.member(&header, kind, size),
        }
    }

    fn member(&mut self, header: &Header<'_>, kind: u8, size: u64) -> Result<(), TarError> {
        let extensions = std::mem::take(&mut self.next);
        let raw = extensions.path.unwrap_or_else(|| header.path());
        let path = self.path(&raw)?;
        let refuse = |why| TarError::Member {
            at: self.at,
            path: path.chars().take(200).collect(),
            why,
        };
        let target = extensions
            .target
            .unwrap_or_else(|| text(header.field(157, 100)).to_vec());
        let target =
            || String::from_utf8(target).map_err(|_| refuse("a link to a name that is not UTF-8"));
        let mut data = 0;
        let offset = self.at + BLOCK;
        let found = match kind {
            // As tars were before there was a kind for directories.
            b'0' | 0 | b'7' if raw.ends_with(b"/") => MemberKind::Dir,
            b'0' | 0 | b'7' => {
                data = extensions.size.unwrap_or(size);
                let end = offset.checked_add(data);
                if end.is_none_or(|end| end > self.size) {
                    return Err(refuse("which ends beyond the end of the tar"));
                }
                MemberKind::File { offset, size: data }
            }
            b'1' => {
                let target = target()?;
                let target = self.path(target.as_bytes())?;
                MemberKind::Hardlink { target }
            }
            b'2' => {
                let target = target()?;
                if target.len() >= MAX_PATH {
                    return Err(refuse("a symlink to a path longer than 4095 bytes"));
                }
                MemberKind::Symlink { target }
            }
            b'5' => MemberKind::Dir,
            b'3' | b'4' | b'6' => return Err(refuse("a device or pipe, which no model has")),
            b'S' => return Err(self.sparse(&path)),
            _ => return Err(refuse("a member of an unknown kind")),
        };
        let mtime = match extensions.mtime {
            Some(mtime) => mtime,
            None => number(header.field(136, 12)).map_or(0, |seconds| seconds as i64),
        };
        let mode = self.number(header.field(100, 8), "a mode is no number")? as u32 & 0o7777;
        if self.members.len() >= self.most {
            return Err(TarError::TooMany(self.most));
        }
        self.members.push(Member {
            path,
            kind: found,
            mode,
            mtime,
        });
        // Fits: it was checked against the size of the tar.
        self.go_on(BLOCK + data.next_multiple_of(BLOCK))
    }

    /// Takes the data of an extension header.
    fn extend(&mut self, kind: u8, data: &[u8]) -> Result<(), TarError> {
        match kind {
            b'L' => self.next.path = Some(text(data).to_vec()),
            b'K' => self.next.target = Some(text(data).to_vec()),
            _ => {
                let mut rest = data;
                while !rest.is_empty() {
                    let Some((key, value, after)) = pax_record(rest) else {
                        return Err(self.damaged("a pax record is malformed"));
                    };
                    rest = after;
                    self.record(kind == b'g', key, value)?;
                }
            }
        }
        Ok(())
    }

    fn record(&mut self, global: bool, key: &[u8], value: &[u8]) -> Result<(), TarError> {
        let matters = matches!(key, b"path" | b"linkpath" | b"size");
        if global && matters {
            return Err(self.damaged("a global header names or sizes all members"));
        }
        match key {
            b"path" => self.next.path = Some(value.to_vec()),
            b"linkpath" => self.next.target = Some(value.to_vec()),
            b"size" => {
                let size = std::str::from_utf8(value).ok().and_then(|v| v.parse().ok());
                let size = size.ok_or_else(|| self.damaged("a pax size is no number"))?;
                self.next.size = Some(size);
            }
            b"mtime" if !global => {
                let seconds = value.split(|&b| b == b'.').next().unwrap_or_default();
                let seconds = std::str::from_utf8(seconds).ok();
                self.next.mtime = seconds.and_then(|v| v.parse().ok());
            }
            _ if key.starts_with(b"GNU.sparse.") => {
                let path = self.next.path.as_deref().unwrap_or_default();
                return Err(self.sparse(&String::from_utf8_lossy(path)));
            }
            _ => {}
        }
        Ok(())
    }

    /// Goes on `by` bytes. A tar may end without the zeros that should end it, and without the last
    /// padding.
    fn go_on(&mut self, by: u64) -> Result<(), TarError> {
        self.at = self.at.saturating_add(by);
        if self.at >= self.size {
            self.done = true;
            if self.extension.is_some() || self.next.path.is_some() || self.next.size.is_some() {
                return Err(self.damaged("it ends after an extension header"));
            }
        } else if self.at.saturating_add(self.needed()) > self.size {
            return Err(self.damaged("it is cut short"));
        }
        Ok(())
    }

    /// The path of a member in plain form.
    fn path(&self, raw: &[u8]) -> Result<String, TarError> {
        let raw = std::str::from_utf8(raw)
            .map_err(|_| self.damaged("it has a name that is not UTF-8"))?;
        if raw.starts_with('/') {
            return Err(TarError::Member {
                at: self.at,
                path: raw.chars().take(200).collect(),
                why: "an absolute path",
            });
        }
        if raw.len() > MAX_PATH {
            return Err(self.damaged("it has a path longer than 4096 bytes"));
        }
        let parts: Vec<_> = raw
            .split('/')
            .filter(|part| !matches!(*part, "" | "."))
            .collect();
        Ok(parts.join("/"))
    }

    fn number(&self, field: &[u8], why: &'static str) -> Result<u64, TarError> {
        number(field).ok_or_else(|| self.damaged(why))
    }

    fn sparse(&self, path: &str) -> TarError {
        TarError::Sparse {
            at: self.at,
            path: path.chars().take(200).collect(),
        }
    }

    const fn damaged(&self, why: &'static str) -> TarError {
        TarError::Damaged { at: self.at, why }
    }
}

/// A header block.
struct Header<'b>(&'b [u8]);

impl<'b> Header<'b> {
    fn field(&self, at: usize, len: usize) -> &'b [u8] {
        &self.0[at..at + len]
    }

    fn kind(&self) -> u8 {
        self.0[156]
    }

    /// Whether the sum of all bytes, those of the sum counted as spaces, is what it says.
    fn checksum_fits(&self) -> bool {
        let sum: u64 = self.0.iter().map(|&b| u64::from(b)).sum();
        let own: u64 = self.field(148, 8).iter().map(|&b| u64::from(b)).sum();
        number(self.field(148, 8)) == Some(sum - own + 8 * u64::from(b' '))
    }

    fn path(&self) -> Vec<u8> {
        let name = text(self.field(0, 100));
        let prefix = match self.field(257, 6) {
            b"ustar\0" => text(self.field(345, 155)),
            _ => b"",
        };
        match prefix {
            b"" => name.to_vec(),
            prefix => [prefix, b"/", name].concat(),
        }
    }
}

/// A field up to its first NUL.
fn text(field: &[u8]) -> &[u8] {
    field.split(|&b| b == 0).next().unwrap_or_default()
}

/// A number in octal, or in base 256 where the first bit is set. Negative ones are none.
fn number(field: &[u8]) -> Option<u64> {
    match field {
        [first, rest @ ..] if first & 0x80 != 0 => {
            let mut value = u64::from(first & 0x7f);
            for &byte in rest {
                value = value.checked_mul(256)? + u64::from(byte);
            }
            Some(value)
        }
        _ => {
            let digits = std::str::from_utf8(text(field)).ok()?.trim();
            match digits {
                "" => Some(0),
                digits => u64::from_str_radix(digits, 8).ok(),
            }
        }
    }
}

/// The first record `<length> <key>=<value>\n`, and what follows it.
fn pax_record(data: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = data.iter().take(8).position(|&b| b == b' ')?;
    let length: usize = std::str::from_utf8(&data[..space]).ok()?.parse().ok()?;
    let record = data.get(space + 1..length)?;
    let (&newline, record) = record.split_last()?;
    let equals = record.iter().position(|&b| b == b'=')?;
    (newline == b'\n').then_some((&record[..equals], &record[equals + 1..], &data[length..]))
}

/// A tar of files, in ustar format, for tests of this and other rooms.
#[cfg(test)]
pub(crate) fn tar(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut out = Vec::new();
    for (path, data) in files {
        out.extend(tests::header(path, b'0', data.len() as u64, ""));
        out.extend(*data);
        out.resize(out.len().next_multiple_of(512), 0);
    }
    out.resize(out.len() + 1024, 0);
    out
}

#[cfg(test)]
mod tests;
