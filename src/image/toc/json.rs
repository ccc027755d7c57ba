//! The rows of a table of contents: JSON, RFC 3339 and base64.

use std::{collections::BTreeMap, fmt};

use serde::{
    Deserialize,
    de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor},
};

use super::{Member, MemberKind};
use crate::{digest::Digest, image::ImageError, tree::MAX_INODES};

/// What becomes of a row.
type Take<'t> = dyn FnMut(Row) -> Result<(), ImageError> + 't;

/// Reads a table row by row: a table of little text may have very many.
struct Table<'t> {
    take: &'t mut Take<'t>,
    /// Why a row was refused.
    refused: &'t mut Option<ImageError>,
}

/// Reads the rows.
struct Rows<'r, 't>(&'r mut Table<'t>);

/// A row: an entry of the layer, or a further chunk of the file before it. Everything that is
/// not there is empty or 0; what is not known is passed over.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct Row {
    #[serde(rename = "type")]
    pub(super) kind: String,
    pub(super) name: String,
    link_name: String,
    mode: i64,
    size: u64,
    uid: i64,
    gid: i64,
    #[serde(rename = "modtime")]
    modified: Option<String>,
    dev_major: i64,
    dev_minor: i64,
    xattrs: Option<BTreeMap<String, String>>,
    digest: String,
    pub(super) offset: u64,
    pub(super) inner_offset: u64,
    pub(super) chunk_size: u64,
    pub(super) chunk_offset: u64,
    chunk_digest: String,
    pub(super) chunk_type: String,
}

/// Gives the rows of a table to `take`, in order, up to the first that it refuses.
pub(super) fn parse(
    text: &[u8],
    mut take: impl FnMut(Row) -> Result<(), ImageError>,
) -> Result<(), ImageError> {
    let mut refused = None;
    let mut input = serde_json::Deserializer::from_slice(text);
    let table = Table {
        take: &mut take,
        refused: &mut refused,
    };
    let version = input
        .deserialize_map(table)
        .and_then(|version| input.end().map(|()| version));
    match (refused, version) {
        (Some(refused), _) => Err(refused),
        (None, Err(error)) => Err(super::wrong(&format!("it is no JSON of its kind: {error}"))),
        (None, Ok(1)) => Ok(()),
        (None, Ok(version)) => {
            let why = format!("its table of contents has version {version}");
            Err(ImageError::unsupported(why))
        }
    }
}

impl<'de> Visitor<'de> for Table<'_> {
    /// The version.
    type Value = u32;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a table of contents")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<u32, A::Error> {
        let (mut version, mut entries) = (None, None);
        while let Some(key) = map.next_key::<String>()? {
            match &*key {
                "version" if version.is_none() => version = Some(map.next_value()?),
                "entries" if entries.is_none() => {
                    entries = Some(map.next_value_seed(Rows(&mut self))?);
                }
                "version" | "entries" => return Err(A::Error::custom("a field is there twice")),
                _ => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        entries.ok_or_else(|| A::Error::missing_field("entries"))?;
        version.ok_or_else(|| A::Error::missing_field("version"))
    }
}

impl<'de> DeserializeSeed<'de> for Rows<'_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, input: D) -> Result<(), D::Error> {
        input.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Rows<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of entries")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut rows: A) -> Result<(), A::Error> {
        let mut count = 0;
        while let Some(row) = rows.next_element()? {
            count += 1;
            let taken = match count <= MAX_INODES {
                true => (self.0.take)(row),
                false => Err(ImageError::too_large(
                    "its table of contents has too many entries",
                )),
            };
            if let Err(refused) = taken {
                *self.0.refused = Some(refused);
                return Err(A::Error::custom("a row is refused"));
            }
        }
        Ok(())
    }
}

impl Row {
    /// The row as a member of a tar, which takes its texts; `offset` and `pieces` are still to come.
    pub(super) fn member(&mut self, kind: MemberKind) -> Result<Member, ImageError> {
        let number = |value: i64| {
            u32::try_from(value).map_err(|_| super::wrong("it has an owner or device below zero"))
        };
        let mut xattrs = Vec::new();
        for (name, value) in self.xattrs.take().unwrap_or_default() {
            let value = base64(value.as_bytes());
            let value = value.ok_or_else(|| super::wrong("an attribute is no base64"))?;
            xattrs.push((name.into_bytes().into(), value.into()));
        }
        let mtime = match &self.modified {
            None => (0, 0),
            Some(text) if text.is_empty() => (0, 0),
            Some(text) => rfc3339(text).ok_or_else(|| super::wrong("a time is no time"))?,
        };
        Ok(Member {
            kind,
            path: std::mem::take(&mut self.name).into_bytes(),
            target: std::mem::take(&mut self.link_name).into_bytes(),
            mode: (self.mode & 0o7777) as u16,
            uid: number(self.uid)?,
            gid: number(self.gid)?,
            mtime,
            major: number(self.dev_major)?,
            minor: number(self.dev_minor)?,
            xattrs,
            size: self.size,
            offset: 0,
            pieces: Vec::new(),
        })
    }

    pub(super) fn digest(&self) -> Result<Option<Digest>, ImageError> {
        digest(&self.digest)
    }

    pub(super) fn chunk_digest(&self) -> Result<Option<Digest>, ImageError> {
        digest(&self.chunk_digest)
    }
}

fn digest(text: &str) -> Result<Option<Digest>, ImageError> {
    match text {
        "" => Ok(None),
        text => {
            let digest = text.parse::<Digest>().map(Some);
            digest.map_err(|_| ImageError::unsupported("its table has another digest than SHA-256"))
        }
    }
}

/// Seconds since the epoch, and nanoseconds (RFC 3339, 5.6).
fn rfc3339(text: &str) -> Option<(i64, u32)> {
    let number = |range: std::ops::Range<usize>| -> Option<i64> {
        let digits = text.get(range)?;
        let all = digits.bytes().all(|byte| byte.is_ascii_digit());
        all.then(|| digits.parse().ok())?
    };
    let mark = |at: usize, marks: &[u8]| text.as_bytes().get(at).filter(|b| marks.contains(b));
    mark(4, b"-")?;
    mark(7, b"-")?;
    mark(10, b"Tt")?;
    mark(13, b":")?;
    mark(16, b":")?;
    let (year, month, day) = (number(0..4)?, number(5..7)?, number(8..10)?);
    let (hour, minute, second) = (number(11..13)?, number(14..16)?, number(17..19)?);
    if !(1..=12).contains(&month)
        || !(1..=31).contains(&day)
        || hour > 23
        || minute > 59
        || second > 60
    {
        return None;
    }
    let mut rest = text.get(19..)?;
    let mut nanos = 0;
    if let Some(fraction) = rest.strip_prefix('.') {
        let len = fraction.bytes().take_while(u8::is_ascii_digit).count();
        let digits = fraction
            .get(..len.min(9))
            .filter(|digits| !digits.is_empty())?;
        nanos = digits.parse::<u32>().ok()? * 10u32.pow(9 - digits.len() as u32);
        rest = &fraction[len..];
    }
    let zone = match rest.as_bytes() {
        b"Z" | b"z" => 0,
        [sign @ (b'+' | b'-'), _, _, b':', _, _] => {
            let at = text.len() - 5;
            let minutes = number(at..at + 2)? * 60 + number(at + 3..at + 5)?;
            if *sign == b'+' { minutes } else { -minutes }
        }
        _ => return None,
    };
    // Days since the epoch, by years that begin in March.
    let (year, month) = match month {
        1 | 2 => (year - 1, month + 9),
        _ => (year, month - 3),
    };
    let (era, of_era) = (year.div_euclid(400), year.rem_euclid(400));
    let of_year = (153 * month + 2) / 5 + day - 1;
    let days = era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468;
    let seconds = days * 86_400 + hour * 3600 + (minute - zone) * 60 + second;
    Some((seconds, nanos))
}

/// Base64 with padding (RFC 4648, 4).
fn base64(text: &[u8]) -> Option<Vec<u8>> {
    let digit = |byte: u8| -> Option<u32> {
        Some(
            match byte {
                b'A'..=b'Z' => byte - b'A',
                b'a'..=b'z' => byte - b'a' + 26,
                b'0'..=b'9' => byte - b'0' + 52,
                b'+' => 62,
                b'/' => 63,
                _ => return None,
            }
            .into(),
        )
    };
    if !text.len().is_multiple_of(4) {
        return None;
    }
    let digits = text
        .strip_suffix(b"==")
        .or(text.strip_suffix(b"="))
        .unwrap_or(text);
    let mut out = Vec::with_capacity(text.len() / 4 * 3);
    for group in digits.chunks(4) {
        let mut bits = 0;
        for &byte in group {
            bits = bits << 6 | digit(byte)?;
        }
        let bytes = (bits << (8 + 6 * (4 - group.len()))).to_be_bytes();
        out.extend_from_slice(&bytes[..group.len() * 6 / 8]);
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_read_row_by_row() {
        let mut names = Vec::new();
        let mut take = |row: Row| {
            names.push(row.name);
            match names.len() < 3 {
                true => Ok(()),
                false => Err(ImageError::unsupported("enough")),
            }
        };
        let table = br#"{"x": [{}], "entries": [{"name": "a"}, {}], "version": 1}"#;
        parse(table, &mut take).unwrap();
        // What follows a row that is refused is not looked at.
        let table = br#"{"version": 1, "entries": [{"name": "b"}, garbage"#;
        assert_eq!(parse(table, &mut take).unwrap_err().to_string(), "enough");
        assert_eq!(names, ["a", "", "b"]);
        for (table, why) in [
            (&br#"{"version": 2, "entries": []}"#[..], "version 2"),
            (br#"{"version": 1}"#, "entries"),
            (br#"{"entries": []}"#, "version"),
            (br#"{"version": 1, "entries": [], "entries": []}"#, "twice"),
            (br#"{"version": 1, "entries": []} x"#, "trailing"),
            (b"[]", "no JSON of its kind"),
        ] {
            let error = parse(table, |_| Ok(())).unwrap_err();
            assert!(error.to_string().contains(why), "{why}: {error}");
        }
    }

    #[test]
    fn times() {
        assert_eq!(rfc3339("1970-01-01T00:00:00Z"), Some((0, 0)));
        assert_eq!(rfc3339("2019-08-20T10:30:43Z"), Some((1_566_297_043, 0)));
        assert_eq!(
            rfc3339("2024-02-29T23:59:59.25+02:00"),
            Some((1_709_243_999, 250_000_000))
        );
        assert_eq!(rfc3339("0001-01-01T00:00:00Z"), Some((-62_135_596_800, 0)));
        for bad in [
            "",
            "2019-08-20",
            "2019-13-20T10:30:43Z",
            "2019-08-20T10:30:43",
            "2019-08-20T10:30:43.Z",
            "2019-08-20 10:30:43Z",
            "2019-08-20T10:30:43\u{e9}",
        ] {
            assert_eq!(rfc3339(bad), None, "{bad}");
        }
    }

    #[test]
    fn base64_of_rfc_4648() {
        for (text, bytes) in [
            ("", ""),
            ("Zg==", "f"),
            ("Zm8=", "fo"),
            ("Zm9v", "foo"),
            ("Zm9vYg==", "foob"),
        ] {
            assert_eq!(base64(text.as_bytes()).unwrap(), bytes.as_bytes());
        }
        assert_eq!(base64(b"/+A="), Some(vec![0xff, 0xe0]));
        for bad in ["Z", "Zg=", "Z===", "Z!==", "Zg==Zg=="] {
            assert_eq!(base64(bad.as_bytes()), None, "{bad}");
        }
    }
}
