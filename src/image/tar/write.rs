//! Writes archives for tests, good and bad ones.

use super::BLOCK;

/// One header and its data, as raw as a test wants it.
#[derive(Debug, Clone)]
pub(in crate::image) struct Put<'a> {
    pub(in crate::image) flag: u8,
    pub(in crate::image) name: &'a [u8],
    pub(in crate::image) target: &'a [u8],
    pub(in crate::image) mode: u32,
    pub(in crate::image) uid: i64,
    pub(in crate::image) gid: i64,
    pub(in crate::image) mtime: i64,
    pub(in crate::image) device: (u32, u32),
    pub(in crate::image) data: &'a [u8],
    pub(in crate::image) gnu: bool,
}

impl Default for Put<'_> {
    fn default() -> Self {
        Self {
            flag: b'0',
            name: b"",
            target: b"",
            mode: 0o644,
            uid: 0,
            gid: 0,
            mtime: 0,
            device: (0, 0),
            data: b"",
            gnu: false,
        }
    }
}

/// An archive that grows.
#[derive(Debug, Clone, Default)]
pub(in crate::image) struct Writer(pub(in crate::image) Vec<u8>);

impl Writer {
    pub(in crate::image) fn put(&mut self, put: &Put<'_>) {
        self.put_with(put, |_| {});
    }

    /// As `put`; `change` may spoil the header, whose checksum is made after it.
    pub(in crate::image) fn put_with(
        &mut self,
        put: &Put<'_>,
        change: impl FnOnce(&mut [u8; BLOCK]),
    ) {
        let mut block = [0u8; BLOCK];
        fill(&mut block[..100], put.name);
        number(&mut block[100..108], put.mode.into());
        number(&mut block[108..116], put.uid);
        number(&mut block[116..124], put.gid);
        number(&mut block[124..136], put.data.len() as i64);
        number(&mut block[136..148], put.mtime);
        block[156] = put.flag;
        fill(&mut block[157..257], put.target);
        let magic: &[u8] = if put.gnu {
            b"ustar  \0"
        } else {
            b"ustar\x0000"
        };
        block[257..265].copy_from_slice(magic);
        number(&mut block[329..337], put.device.0.into());
        number(&mut block[337..345], put.device.1.into());
        change(&mut block);
        sum(&mut block);
        self.0.extend_from_slice(&block);
        self.data(put.data);
    }

    /// Data and the padding after it.
    pub(in crate::image) fn data(&mut self, data: &[u8]) {
        self.0.extend_from_slice(data);
        let end = self.0.len().next_multiple_of(BLOCK);
        self.0.resize(end, 0);
    }

    /// An extended header for the next member.
    pub(in crate::image) fn pax(&mut self, records: &[(&[u8], &[u8])]) {
        let mut data = Vec::new();
        for (key, value) in records {
            let rest = key.len() + value.len() + 3;
            let mut length = rest;
            while length != rest + length.to_string().len() {
                length = rest + length.to_string().len();
            }
            data.extend_from_slice(format!("{length} ").as_bytes());
            data.extend_from_slice(&[key, &b"="[..], value, b"\n"].concat());
        }
        self.put(&Put {
            flag: b'x',
            name: b"PaxHeaders/x",
            data: &data,
            ..Put::default()
        });
    }

    /// The long name (`L`) or link target (`K`) of the next member.
    pub(in crate::image) fn long(&mut self, flag: u8, text: &[u8]) {
        self.put(&Put {
            flag,
            name: b"././@LongLink",
            data: &[text, &b"\0"[..]].concat(),
            gnu: true,
            ..Put::default()
        });
    }

    pub(in crate::image) fn file(&mut self, name: &str, content: &[u8]) {
        self.put(&Put {
            name: name.as_bytes(),
            data: content,
            ..Put::default()
        });
    }

    /// A member without data: `flag` as in the header.
    pub(in crate::image) fn other(&mut self, flag: u8, name: &str, target: &str) {
        self.put(&Put {
            flag,
            name: name.as_bytes(),
            target: target.as_bytes(),
            mode: 0o755,
            ..Put::default()
        });
    }

    /// The archive with its end.
    pub(in crate::image) fn end(mut self) -> Vec<u8> {
        self.0.extend_from_slice(&[0; 2 * BLOCK]);
        self.0
    }
}

fn fill(field: &mut [u8], text: &[u8]) {
    let len = text.len().min(field.len());
    field[..len].copy_from_slice(&text[..len]);
}

/// In octal, or in base 256 where that does not do.
pub(in crate::image) fn number(field: &mut [u8], value: i64) {
    let digits = field.len() - 1;
    let octal = format!("{value:0digits$o}");
    if value >= 0 && octal.len() <= digits {
        fill(field, octal.as_bytes());
        return;
    }
    let fill = if value < 0 { 0xff } else { 0 };
    let wide = [[fill; 8], value.to_be_bytes()].concat();
    field.copy_from_slice(&wide[16 - field.len()..]);
    field[0] |= 0x80;
}

pub(in crate::image) fn sum(block: &mut [u8; BLOCK]) {
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|&b| u32::from(b)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}
