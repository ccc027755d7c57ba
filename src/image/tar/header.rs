//! The fields of one header block.

use super::BLOCK;

/// What a header block says, before extended headers change it.
#[derive(Debug)]
pub(super) struct Raw {
    pub(super) flag: u8,
    pub(super) name: Vec<u8>,
    pub(super) target: Vec<u8>,
    pub(super) mode: i64,
    pub(super) uid: i64,
    pub(super) gid: i64,
    pub(super) size: u64,
    pub(super) mtime: i64,
    pub(super) major: i64,
    pub(super) minor: i64,
    /// It has the magic of GNU tar.
    pub(super) gnu: bool,
}

impl Raw {
    /// Reads a block that is not all zeros.
    pub(super) fn parse(block: &[u8; BLOCK]) -> Result<Self, &'static str> {
        check_sum(block)?;
        let ustar = &block[257..263] == b"ustar\0";
        let gnu = &block[257..265] == b"ustar  \0";
        let flag = block[156];
        let field = |from: usize, len: usize, why| number(&block[from..from + len]).ok_or(why);
        let (mut major, mut minor) = (0, 0);
        if (ustar || gnu) && matches!(flag, b'3' | b'4') {
            major = field(329, 8, "its device number is not a number")?;
            minor = field(337, 8, "its device number is not a number")?;
        }
        let prefix: &[u8] = if ustar && &block[508..512] == b"tar\0" {
            text(&block[345..476])
        } else if ustar {
            text(&block[345..500])
        } else if gnu {
            gnu_prefix(block)
        } else {
            b""
        };
        let name = text(&block[..100]);
        let name = match prefix {
            b"" => name.to_vec(),
            _ => [prefix, b"/", name].concat(),
        };
        let size = field(124, 12, "its size is not a number")?;
        Ok(Self {
            flag,
            name,
            target: text(&block[157..257]).to_vec(),
            mode: field(100, 8, "its mode is not a number")?,
            uid: field(108, 8, "its owner is not a number")?,
            gid: field(116, 8, "its group is not a number")?,
            size: u64::try_from(size).map_err(|_| "its size is negative")?,
            mtime: field(136, 12, "its modification time is not a number")?,
            major,
            minor,
            gnu,
        })
    }
}

/// Headers of GNU tar have two times where ustar has a prefix. Go's writer before 1.8 put a prefix
/// there all the same (golang.org/issue/12594), and such layers are still around.
fn gnu_prefix(block: &[u8; BLOCK]) -> &[u8] {
    let is_time = |field: &[u8]| field[0] == 0 || number(field).is_some();
    if is_time(&block[345..357]) && is_time(&block[357..369]) {
        return b"";
    }
    let prefix = text(&block[345..500]);
    match prefix.is_ascii() {
        true => prefix,
        false => b"",
    }
}

/// The sum of all bytes, with spaces for itself. Some old archivers summed signed bytes.
fn check_sum(block: &[u8; BLOCK]) -> Result<(), &'static str> {
    const AT: std::ops::Range<usize> = 148..156;
    let wanted = number(&block[AT]).ok_or("its checksum is not a number")?;
    let spaces = 8 * i64::from(b' ');
    let unsigned = |bytes: &[u8]| bytes.iter().map(|&b| i64::from(b)).sum::<i64>();
    if wanted == unsigned(block) - unsigned(&block[AT]) + spaces {
        return Ok(());
    }
    let signed = |bytes: &[u8]| bytes.iter().map(|&b| i64::from(b as i8)).sum::<i64>();
    if wanted == signed(block) - signed(&block[AT]) + spaces {
        return Ok(());
    }
    Err("its checksum is wrong: the archive is damaged, or this is no tar")
}

/// Up to the first NUL.
fn text(field: &[u8]) -> &[u8] {
    let end = field.iter().position(|&b| b == 0);
    &field[..end.unwrap_or(field.len())]
}

/// A number in octal digits or, with the first bit set, in base 256 (two's complement).
pub(super) fn number(field: &[u8]) -> Option<i64> {
    match field.first() {
        Some(&first) if first & 0x80 != 0 => binary(field, first & 0x40 != 0),
        _ => octal(field),
    }
}

fn binary(field: &[u8], negative: bool) -> Option<i64> {
    let mut value = match negative {
        true => -1i64,
        false => 0,
    };
    for (at, &byte) in field.iter().enumerate() {
        // The first bit is the mark, the second the sign.
        let byte = match (at, negative) {
            (0, true) => byte | 0x80,
            (0, false) => byte & 0x7f,
            _ => byte,
        };
        let shifted = value.checked_mul(256)?;
        value = shifted | i64::from(byte);
    }
    Some(value)
}

fn octal(field: &[u8]) -> Option<i64> {
    let is_fill = |b: &u8| matches!(b, b' ' | 0);
    let start = field.iter().position(|b| !is_fill(b));
    let Some(start) = start else {
        return Some(0);
    };
    let digits = text(&field[start..]);
    let end = digits.iter().rposition(|b| !is_fill(b))?;
    digits[..=end].iter().try_fold(0i64, |value, &digit| {
        if !(b'0'..=b'7').contains(&digit) {
            return None;
        }
        Some(value.checked_mul(8)? | i64::from(digit - b'0'))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers() {
        for (field, value) in [
            (&b"0000644\0"[..], Some(0o644)),
            (b"   644 \0", Some(0o644)),
            (b"\0\0\0\0", Some(0)),
            (b"        ", Some(0)),
            (b"777777777777", Some(0o777_777_777_777)),
            (b"12\x0034", Some(0o12)),
            (b"18", None),
            (b"-1", None),
            (b"1 2", None),
            (b"\x80\0\0\0\0\0\0\x01", Some(1)),
            (
                b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff",
                Some(i64::MAX),
            ),
            (b"\x80\0\0\0\x80\0\0\0\0\0\0\0", None),
            (b"\xff\xff\xff\xff\xff\xff\xff\xff", Some(-1)),
            (b"\xff\xff\xff\xff\xff\xff\xff\xfe", Some(-2)),
            (b"\xff\xff\xff\xff\x80\0\0\0\0\0\0\0", Some(i64::MIN)),
            (b"\xc0\0\0\0\0\0\0\0\0\0\0\0", None),
            (b"", Some(0)),
        ] {
            assert_eq!(number(field), value, "{field:?}");
        }
    }
}
