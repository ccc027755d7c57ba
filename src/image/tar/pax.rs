//! The records of a PAX extended header: `<length> <key>=<value>\n`.

use std::collections::BTreeMap;

use super::sparse::PaxSparse;

/// What an extended header says of the next member.
#[derive(Debug, Default)]
pub(super) struct Pax {
    pub(super) path: Option<Vec<u8>>,
    pub(super) target: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<i64>,
    pub(super) gid: Option<i64>,
    pub(super) mtime: Option<(i64, u32)>,
    pub(super) xattrs: BTreeMap<Box<[u8]>, Box<[u8]>>,
    pub(super) sparse: PaxSparse,
}

impl Pax {
    pub(super) fn parse(mut data: &[u8]) -> Result<Self, &'static str> {
        let mut pax = Self::default();
        while !data.is_empty() {
            let (key, value, rest) = record(data).ok_or("an extended header is malformed")?;
            data = rest;
            pax.take(key, value)?;
        }
        Ok(pax)
    }

    fn take(&mut self, key: &[u8], value: &[u8]) -> Result<(), &'static str> {
        if key.contains(&0) {
            return Err("an extended header has a NUL byte in a key");
        }
        // An empty value takes back what earlier records said.
        let set = !value.is_empty();
        match key {
            b"path" | b"linkpath" => {
                if value.contains(&0) {
                    return Err("an extended header has a NUL byte in a path");
                }
                let slot = match key {
                    b"path" => &mut self.path,
                    _ => &mut self.target,
                };
                *slot = set.then(|| value.to_vec());
            }
            b"size" => self.size = optional(value, decimal, "an extended header has a bad size")?,
            b"uid" => self.uid = optional(value, decimal, "an extended header has a bad owner")?,
            b"gid" => self.gid = optional(value, decimal, "an extended header has a bad group")?,
            b"mtime" => self.mtime = optional(value, time, "an extended header has a bad time")?,
            _ => {
                if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                    self.xattrs.insert(name.into(), value.into());
                } else if let Some(key) = key.strip_prefix(b"GNU.sparse.") {
                    self.sparse.take(key, value)?;
                }
            }
        }
        Ok(())
    }
}

/// The first record: key, value and what follows it.
fn record(data: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    // A length of more digits cannot be right; do not look for its end in a megabyte.
    let space = data.iter().take(20).position(|&b| b == b' ')?;
    let length: usize = decimal(&data[..space])?;
    if length < space + 2 {
        return None;
    }
    let (record, rest) = data.split_at_checked(length)?;
    let record = record[space + 1..].strip_suffix(b"\n")?;
    let equals = record.iter().position(|&b| b == b'=')?;
    (equals > 0).then(|| (&record[..equals], &record[equals + 1..], rest))
}

fn optional<T>(
    value: &[u8],
    parse: fn(&[u8]) -> Option<T>,
    why: &'static str,
) -> Result<Option<T>, &'static str> {
    match value {
        b"" => Ok(None),
        _ => parse(value).map(Some).ok_or(why),
    }
}

pub(super) fn decimal<T: std::str::FromStr>(text: &[u8]) -> Option<T> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// Seconds with any number of decimals, of which nine count.
fn time(text: &[u8]) -> Option<(i64, u32)> {
    let point = text.iter().position(|&b| b == b'.');
    let (whole, decimals) = match point {
        Some(at) => (&text[..at], &text[at + 1..]),
        None => (text, &b""[..]),
    };
    let seconds: i64 = decimal(whole)?;
    if !decimals.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let nanos = (0..9).fold(0, |nanos, at| {
        nanos * 10 + u32::from(decimals.get(at).map_or(0, |digit| digit - b'0'))
    });
    // -0.5 and -1.5 are before their seconds.
    if whole.starts_with(b"-") && nanos > 0 {
        return Some((seconds.checked_sub(1)?, 1_000_000_000 - nanos));
    }
    Some((seconds, nanos))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records() {
        assert_eq!(
            record(b"11 path=ab\nrest"),
            Some((&b"path"[..], &b"ab"[..], &b"rest"[..]))
        );
        assert_eq!(record(b"6 a=\n\n"), Some((&b"a"[..], &b"\n"[..], &b""[..])));
        for bad in [
            &b""[..],
            b"x",
            b"12 path=ab\n",
            b"10 path=ab\n",
            b"0 a=b\n",
            b"2 a=b\n",
            b"-6 a=b\n",
            b"4 =\n\n",
            b"6 ab\n \n",
            b"99999999999999999999 a=b\n",
            b"18446744073709551615 a=b\n",
        ] {
            assert_eq!(record(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn times() {
        assert_eq!(time(b"1"), Some((1, 0)));
        assert_eq!(time(b"1."), Some((1, 0)));
        assert_eq!(
            time(b"1350244992.023960108"),
            Some((1_350_244_992, 23_960_108))
        );
        assert_eq!(time(b"1.0239601089999"), Some((1, 23_960_108)));
        assert_eq!(time(b"0.5"), Some((0, 500_000_000)));
        assert_eq!(time(b"-0.5"), Some((-1, 500_000_000)));
        assert_eq!(time(b"-1.5"), Some((-2, 500_000_000)));
        for bad in [
            &b""[..],
            b".5",
            b"1.x",
            b"x",
            b"1.-5",
            b"-9223372036854775808.5",
        ] {
            assert_eq!(time(bad), None, "{bad:?}");
        }
    }
}
