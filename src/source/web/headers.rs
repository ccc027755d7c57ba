//! Parsers of response headers. Any bytes may come; none panics.

use std::{
    ops::Range,
    time::{Duration, UNIX_EPOCH},
};

use reqwest::{
    StatusCode,
    header::{self, AsHeaderName, HeaderMap},
};

use crate::source::{MAX_WAIT, retry_after as wait};

/// The header as text; `None` where it is absent or not ASCII.
pub(crate) fn text(headers: &HeaderMap, name: impl AsHeaderName) -> Option<&str> {
    headers.get(name)?.to_str().ok().map(str::trim)
}

/// `Content-Range: bytes a-b/total` (RFC 9110, 14.4) as `a..b + 1` and the total, if told.
pub(super) fn content_range(headers: &HeaderMap) -> Option<(Range<u64>, Option<u64>)> {
    let (range, total) = range_parts(headers)?;
    let (first, last) = range.split_once('-')?;
    let (first, last) = (number(first)?, number(last)?);
    if last < first || last == u64::MAX {
        return None;
    }
    let total = match total {
        "*" => None,
        total => Some(number(total)?),
    };
    (total.is_none_or(|total| last < total)).then_some((first..last + 1, total))
}

/// The total of a `Content-Range`, also of `bytes */total`.
pub(crate) fn total_of(headers: &HeaderMap) -> Option<u64> {
    number(range_parts(headers)?.1)
}

fn range_parts(headers: &HeaderMap) -> Option<(&str, &str)> {
    let value = text(headers, header::CONTENT_RANGE)?;
    let (unit, rest) = value.split_once(' ')?;
    let (range, total) = rest.trim().split_once('/')?;
    unit.eq_ignore_ascii_case("bytes")
        .then_some((range.trim(), total.trim()))
}

/// Digits only: no sign, no space.
fn number(text: &str) -> Option<u64> {
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    digits.then(|| text.parse().ok())?
}

/// `Last-Modified` in seconds since the epoch; 0 where absent or unreadable.
pub(crate) fn last_modified(headers: &HeaderMap) -> i64 {
    text(headers, header::LAST_MODIFIED)
        .and_then(|date| httpdate::parse_http_date(date).ok())
        .and_then(|time| time.duration_since(UNIX_EPOCH).ok())
        .and_then(|since| i64::try_from(since.as_secs()).ok())
        .unwrap_or(0)
}

/// How long to wait: `Retry-After` in seconds or as a date, else on 429 the reset of the Hub's
/// `RateLimit: "api";r=0;t=55` (draft-ietf-httpapi-ratelimit-headers) or of `RateLimit-Reset`.
pub(super) fn retry_after(status: StatusCode, headers: &HeaderMap) -> Option<Duration> {
    let asked = text(headers, header::RETRY_AFTER).and_then(wait);
    asked.or_else(|| {
        if status != StatusCode::TOO_MANY_REQUESTS {
            return None;
        }
        let reset = text(headers, "ratelimit").and_then(rate_limit_reset);
        let reset = reset.or_else(|| number(text(headers, "ratelimit-reset")?));
        reset.map(|seconds| Duration::from_secs(seconds).min(MAX_WAIT))
    })
}

/// The parameter `t` of the first policy with nothing left, else the smallest `t`.
fn rate_limit_reset(value: &str) -> Option<u64> {
    let mut least: Option<u64> = None;
    for policy in value.split(',') {
        let parameter = |name: &str| {
            policy.split(';').skip(1).find_map(|part| {
                let (key, value) = part.split_once('=')?;
                (key.trim() == name).then(|| number(value.trim()))?
            })
        };
        let Some(reset) = parameter("t") else {
            continue;
        };
        if parameter("r") == Some(0) {
            return Some(reset);
        }
        least = Some(least.map_or(reset, |least| least.min(reset)));
    }
    least
}

/// The target of the link with `rel="next"` (RFC 8288).
pub(crate) fn link_next(value: &str) -> Option<&str> {
    let mut rest = value;
    loop {
        let start = rest.find('<')?;
        let (target, after) = rest[start + 1..].split_once('>')?;
        let end = after.find('<').unwrap_or(after.len());
        let parameters = &after[..end];
        let is_next = parameters.split([';', ',']).any(|part| {
            part.split_once('=').is_some_and(|(key, value)| {
                key.trim().eq_ignore_ascii_case("rel")
                    && value
                        .trim()
                        .trim_matches('"')
                        .split_ascii_whitespace()
                        .any(|rel| rel.eq_ignore_ascii_case("next"))
            })
        });
        if is_next {
            return Some(target);
        }
        rest = &after[end..];
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use proptest::prelude::*;

    use super::*;

    fn map(name: &'static str, value: &str) -> HeaderMap {
        HeaderMap::from_iter([(
            header::HeaderName::from_static(name),
            header::HeaderValue::from_bytes(value.as_bytes()).unwrap(),
        )])
    }

    #[test]
    fn content_ranges() {
        let parse = |value| content_range(&map("content-range", value));
        assert_eq!(parse("bytes 0-0/1"), Some((0..1, Some(1))));
        assert_eq!(parse("bytes 5-9/*"), Some((5..10, None)));
        assert_eq!(parse("Bytes 5-9/10"), Some((5..10, Some(10))));
        for bad in [
            "bytes 9-5/10",
            "bytes 0-9/9",
            "bytes */10",
            "items 0-1/2",
            "bytes 0-18446744073709551615/*",
            "bytes +0-1/2",
            "bytes 0-1",
            "",
        ] {
            assert_eq!(parse(bad), None, "{bad}");
        }
        assert_eq!(total_of(&map("content-range", "bytes */0")), Some(0));
        assert_eq!(total_of(&map("content-range", "bytes 0-0/*")), None);
    }

    #[test]
    fn waits() {
        let wait = |status: u16, name, value: &str| {
            let status = StatusCode::from_u16(status).unwrap();
            retry_after(status, &map(name, value)).map(|wait| wait.as_secs())
        };
        assert_eq!(wait(503, "retry-after", "7"), Some(7));
        assert_eq!(
            wait(429, "retry-after", "99999999999"),
            Some(MAX_WAIT.as_secs())
        );
        assert_eq!(wait(429, "retry-after", "-1"), None);
        let past = "Wed, 21 Oct 2015 07:28:00 GMT";
        assert_eq!(wait(429, "retry-after", past), Some(0));
        let soon = httpdate::fmt_http_date(SystemTime::now() + Duration::from_secs(30));
        assert!((25..=31).contains(&wait(429, "retry-after", &soon).unwrap()));
        assert_eq!(wait(429, "ratelimit", r#""api";r=0;t=55"#), Some(55));
        assert_eq!(
            wait(429, "ratelimit", r#""pages";r=3;t=9, "api";r=0;t=55"#),
            Some(55)
        );
        assert_eq!(wait(200, "ratelimit", r#""api";r=0;t=55"#), None);
        assert_eq!(wait(429, "ratelimit-reset", "4"), Some(4));
    }

    #[test]
    fn links() {
        assert_eq!(
            link_next(r#"<https://h/a?cursor=x>; rel="next""#),
            Some("https://h/a?cursor=x")
        );
        assert_eq!(
            link_next(r#"</p>; rel="prev", </n?a=1,2>; title="x"; rel=next"#),
            Some("/n?a=1,2")
        );
        assert_eq!(link_next(r#"<x>; rel="prev""#), None);
        assert_eq!(link_next("<x"), None);
    }

    proptest! {
        #[test]
        fn no_header_panics(value in "[ -~]{0,80}") {
            let headers = map("content-range", &value);
            content_range(&headers);
            total_of(&headers);
            last_modified(&map("last-modified", &value));
            for name in ["retry-after", "ratelimit", "ratelimit-reset"] {
                retry_after(StatusCode::TOO_MANY_REQUESTS, &map(name, &value));
            }
            link_next(&value);
        }

        #[test]
        fn near_misses_do_not_panic(
            range in r"bytes [0-9*]{0,21}-?[0-9]{0,21}/?[0-9*]{0,21}",
            limit in r#""?[a-z]{0,3}"?(;[rtw]=[0-9-]{0,22}){0,4},?"#,
            link in r#"(<[a-z/?é]{0,6}>?;? ?(rel="?(next|prev)"?)?,?){0,4}"#,
        ) {
            content_range(&map("content-range", &range));
            total_of(&map("content-range", &range));
            rate_limit_reset(&limit);
            link_next(&link);
        }
    }
}
