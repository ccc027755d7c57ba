//! Settings of the store, and sizes as people write them.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use super::{StoreError, StoreErrorKind};

/// Settings of the store.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Most bytes that the store may take on its disk; no limit where absent.
    pub max_bytes: Option<ByteSize>,
    /// Bytes of the file system that the store leaves free.
    pub min_free: ByteSize,
    /// A collection starts to evict above this part of what the store may take.
    pub high_watermark: f64,
    /// A collection evicts down to this part of what the store may take.
    pub low_watermark: f64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            max_bytes: None,
            min_free: ByteSize(1 << 30),
            high_watermark: 0.95,
            low_watermark: 0.85,
        }
    }
}

impl Config {
    /// Whether the settings make sense together.
    ///
    /// # Errors
    /// [`StoreErrorKind::Invalid`], naming the setting.
    pub fn check(&self) -> Result<(), StoreError> {
        let (low, high) = (self.low_watermark, self.high_watermark);
        if !(0.0 < low && low <= high && high <= 1.0) {
            return Err(StoreError::new(
                StoreErrorKind::Invalid,
                format!(
                    "store.low_watermark = {low} and store.high_watermark = {high}: expected \
                     0 < low <= high <= 1"
                ),
            ));
        }
        Ok(())
    }
}

/// A number of bytes, written as `4096`, `1.5GiB`, `200 GB`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct ByteSize(pub u64);

const UNITS: [(&str, u64); 5] = [
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("B", 1),
];
const DECIMAL_UNITS: [(&str, u64); 5] = [
    ("TB", 1_000_000_000_000),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("KB", 1000),
    ("kB", 1000),
];

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match UNITS.iter().find(|(_, unit)| self.0 >= *unit) {
            Some((name, unit)) if *unit > 1 => {
                write!(f, "{:.1} {name}", self.0 as f64 / *unit as f64)
            }
            _ => write!(f, "{} B", self.0),
        }
    }
}

impl FromStr for ByteSize {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let fail = || {
            let text: String = text.chars().take(40).collect();
            format!(
                "{text:?} is not a size: expected bytes, or a number with KiB, MiB, GiB, TiB (or kB, MB, GB, TB)"
            )
        };
        let trimmed = text.trim();
        if let Ok(bytes) = trimmed.parse() {
            return Ok(Self(bytes));
        }
        let cut = trimmed
            .find(|c: char| c.is_ascii_alphabetic())
            .ok_or_else(fail)?;
        let (number, unit) = (trimmed[..cut].trim(), &trimmed[cut..]);
        let (_, unit) = UNITS
            .iter()
            .chain(&DECIMAL_UNITS)
            .find(|(name, _)| *name == unit)
            .ok_or_else(fail)?;
        if let Ok(whole) = number.parse::<u64>() {
            return whole.checked_mul(*unit).map(Self).ok_or_else(fail);
        }
        let plain = |c: char| c.is_ascii_digit() || c == '.';
        let number: f64 = match number.chars().all(plain) {
            true => number.parse().map_err(|_| fail())?,
            false => return Err(fail()),
        };
        let bytes = number * *unit as f64;
        if bytes >= u64::MAX as f64 {
            return Err(fail());
        }
        Ok(Self(bytes as u64))
    }
}

impl Serialize for ByteSize {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        // The largest unit that divides it, so that reading it back gives the same number.
        match UNITS
            .iter()
            .find(|(_, u)| self.0 > 0 && self.0.is_multiple_of(*u))
        {
            Some((name, unit)) if *unit > 1 => {
                serializer.collect_str(&format_args!("{}{name}", self.0 / unit))
            }
            _ => serializer.serialize_u64(self.0),
        }
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl serde::de::Visitor<'_> for Visitor {
            type Value = ByteSize;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a size such as 4096 or \"200GiB\"")
            }
            fn visit_u64<E: serde::de::Error>(self, bytes: u64) -> Result<ByteSize, E> {
                Ok(ByteSize(bytes))
            }
            fn visit_i64<E: serde::de::Error>(self, bytes: i64) -> Result<ByteSize, E> {
                let invalid = serde::de::Unexpected::Signed(bytes);
                u64::try_from(bytes)
                    .map(ByteSize)
                    .map_err(|_| E::invalid_value(invalid, &self))
            }
            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<ByteSize, E> {
                text.parse().map_err(E::custom)
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_parse_as_people_write_them() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("200GiB", 200 << 30),
            (" 1.5 GiB ", 3 << 29),
            ("2TB", 2_000_000_000_000),
            ("7 kB", 7000),
        ] {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
        for bad in [
            "",
            "GiB",
            "-1",
            "1e9B",
            "5 apples",
            "99999999TiB",
            "nanB",
            "1..2GiB",
        ] {
            assert!(bad.parse::<ByteSize>().is_err(), "{bad}");
        }
        assert_eq!(ByteSize(3 << 29).to_string(), "1.5 GiB");
        assert_eq!(ByteSize(12).to_string(), "12 B");
    }

    #[test]
    fn settings_are_strict_and_round_trip() {
        let config: Config = toml::from_str("max_bytes = \"200GiB\"\nmin_free = 5000").unwrap();
        assert_eq!(config.max_bytes, Some(ByteSize(200 << 30)));
        assert_eq!(config.min_free, ByteSize(5000));
        let text = toml::to_string(&config).unwrap();
        assert!(text.contains("\"200GiB\""), "{text}");
        assert_eq!(toml::from_str::<Config>(&text).unwrap(), config);
        for bad in ["max_byte = 1", "max_bytes = -1", "max_bytes = \"x\""] {
            assert!(toml::from_str::<Config>(bad).is_err(), "{bad}");
        }
        let bad: Config = toml::from_str("low_watermark = 0.99").unwrap();
        assert!(
            bad.check()
                .unwrap_err()
                .to_string()
                .contains("low_watermark")
        );
    }
}
