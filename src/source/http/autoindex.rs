//! Directory pages of web servers: what they list. Any bytes may come; nothing panics.
//!
//! Understood are the HTML pages of nginx, Apache, lighttpd, Caddy, Python's `http.server` and
//! their like (any page whose links lead one step down), and nginx's `autoindex_format json`. A link
//! counts only if it leads to a direct child of the page; sort links (`?C=N`), the parent, and
//! links elsewhere do not.

use std::{borrow::Cow, collections::HashSet};

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use serde::Deserialize;
use url::Url;

/// Bytes of a path segment that are written as they are (RFC 3986, unreserved).
pub(super) const SEGMENT: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'_')
    .remove(b'.')
    .remove(b'~');

/// A child of a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Child {
    /// Its name, decoded; never empty, `.`, `..`, and never with a slash.
    pub(super) name: String,
    /// The name as it stands in a URL.
    pub(super) segment: String,
    pub(super) is_dir: bool,
}

/// Why a page could not be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(super) enum PageError {
    #[error("its listing is no JSON as nginx writes it: {0}")]
    Json(String),
    #[error("its listing has the name {0:?}, which cannot be a file name")]
    Name(String),
}

#[derive(Deserialize)]
struct JsonEntry {
    name: String,
    #[serde(rename = "type")]
    kind: String,
}

/// The children in nginx's JSON.
pub(super) fn parse_json(body: &[u8]) -> Result<Vec<Child>, PageError> {
    let entries: Vec<JsonEntry> =
        serde_json::from_slice(body).map_err(|error| PageError::Json(error.to_string()))?;
    let mut children = Vec::with_capacity(entries.len());
    for entry in entries {
        let is_dir = match entry.kind.as_str() {
            "directory" => true,
            "file" => false,
            _ => continue,
        };
        if !is_name(&entry.name) {
            return Err(PageError::Name(entry.name.chars().take(80).collect()));
        }
        children.push(Child {
            segment: utf8_percent_encode(&entry.name, SEGMENT).to_string(),
            name: entry.name,
            is_dir,
        });
    }
    Ok(children)
}

/// The children that the HTML page at `base` (ends in `/`) links to.
pub(super) fn parse_html(base: &Url, body: &[u8]) -> Result<Vec<Child>, PageError> {
    let page = String::from_utf8_lossy(body);
    let mut seen = HashSet::new();
    let mut children = Vec::new();
    for href in Hrefs(&page) {
        let href = unescape(href);
        let href = href.trim();
        // A link that only sorts the page, or into it.
        if href.is_empty() || href.starts_with(['?', '#']) {
            continue;
        }
        let Ok(target) = base.join(href) else {
            continue;
        };
        if target.origin() != base.origin() || target.query().is_some() {
            continue;
        }
        let Some(below) = target.path().strip_prefix(base.path()) else {
            continue;
        };
        let (segment, is_dir) = match below.strip_suffix('/') {
            Some(segment) => (segment, true),
            None => (below, false),
        };
        if segment.is_empty() || segment.contains('/') || !seen.insert(segment.to_owned()) {
            continue;
        }
        let name = percent_decode_str(segment).decode_utf8();
        match name {
            Ok(name) if is_name(&name) => children.push(Child {
                name: name.into_owned(),
                segment: segment.to_owned(),
                is_dir,
            }),
            _ => return Err(PageError::Name(segment.chars().take(80).collect())),
        }
    }
    Ok(children)
}

fn is_name(name: &str) -> bool {
    !matches!(name, "" | "." | "..") && !name.contains(['/', '\0'])
}

/// The `href` values of the `a` tags of a page, as written.
struct Hrefs<'p>(&'p str);

impl<'p> Iterator for Hrefs<'p> {
    type Item = &'p str;

    fn next(&mut self) -> Option<&'p str> {
        loop {
            let at = self.0.find('<')?;
            let tag = &self.0[at + 1..];
            self.0 = tag;
            if let Some(rest) = tag.strip_prefix("!--") {
                self.0 = rest.find("-->").map_or("", |end| &rest[end + 3..]);
                continue;
            }
            let mut chars = tag.chars();
            let is_anchor = chars.next().is_some_and(|c| c.eq_ignore_ascii_case(&'a'))
                && chars.next().is_some_and(|c| c.is_ascii_whitespace());
            if !is_anchor {
                continue;
            }
            let (href, rest) = href(&tag[1..]);
            self.0 = rest;
            if href.is_some() {
                return href;
            }
        }
    }
}

/// The `href` among the attributes at the start of `text`, and what follows the tag.
fn href(mut text: &str) -> (Option<&str>, &str) {
    let mut found = None;
    loop {
        text = text.trim_start_matches(|c: char| c.is_ascii_whitespace() || c == '/');
        let Some(first) = text.chars().next() else {
            return (found, text);
        };
        if first == '>' {
            return (found, &text[1..]);
        }
        let ends = |c: char| c.is_ascii_whitespace() || "=>/".contains(c);
        // At least one character, so that a stray `=` does not stop the walk.
        let name_end = text[first.len_utf8()..]
            .find(ends)
            .map_or(text.len(), |end| end + first.len_utf8());
        let (name, rest) = text.split_at(name_end);
        text = rest.trim_start_matches(|c: char| c.is_ascii_whitespace());
        let Some(rest) = text.strip_prefix('=') else {
            continue;
        };
        let rest = rest.trim_start_matches(|c: char| c.is_ascii_whitespace());
        let value;
        (value, text) = match rest.chars().next() {
            Some(quote @ ('"' | '\'')) => match rest[1..].split_once(quote) {
                Some(parts) => parts,
                None => return (found, ""),
            },
            _ => rest.split_at(
                rest.find(|c: char| c.is_ascii_whitespace() || c == '>')
                    .unwrap_or(rest.len()),
            ),
        };
        if found.is_none() && name.eq_ignore_ascii_case("href") {
            found = Some(value);
        }
    }
}

/// Resolves the character references that may stand in a URL.
fn unescape(text: &str) -> Cow<'_, str> {
    if !text.contains('&') {
        return Cow::Borrowed(text);
    }
    let mut plain = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('&') {
        plain.push_str(&rest[..at]);
        rest = &rest[at..];
        let end = rest.bytes().take(12).position(|b| b == b';');
        let decoded = end.and_then(|end| Some((entity(&rest[1..end])?, end + 1)));
        let (c, used) = decoded.unwrap_or(('&', 1));
        plain.push(c);
        rest = &rest[used..];
    }
    plain.push_str(rest);
    Cow::Owned(plain)
}

fn entity(name: &str) -> Option<char> {
    Some(match name {
        "amp" => '&',
        "lt" => '<',
        "gt" => '>',
        "quot" => '"',
        "apos" => '\'',
        _ => {
            let number = name.strip_prefix('#')?;
            let code = match number.strip_prefix(['x', 'X']) {
                Some(hex) => u32::from_str_radix(hex, 16),
                None => number.parse(),
            };
            char::from_u32(code.ok()?)?
        }
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn base() -> Url {
        Url::parse("http://h/models/m/").unwrap()
    }

    fn names(page: &str) -> Vec<(String, bool)> {
        let children = parse_html(&base(), page.as_bytes()).unwrap();
        children.into_iter().map(|c| (c.name, c.is_dir)).collect()
    }

    fn file(name: &str) -> (String, bool) {
        (name.to_owned(), false)
    }

    fn dir(name: &str) -> (String, bool) {
        (name.to_owned(), true)
    }

    #[test]
    fn the_corpus() {
        crate::corpus::replay("corpus/listing", |input| {
            for children in [parse_html(&base(), input), parse_json(input)] {
                assert!(
                    children
                        .into_iter()
                        .flatten()
                        .all(|child| is_name(&child.name))
                );
            }
        });
    }

    #[test]
    fn nginx() {
        let page = "<html>\r\n<head><title>Index of /models/m/</title></head>\r\n<body>\r\n\
            <h1>Index of /models/m/</h1><hr><pre><a href=\"../\">../</a>\r\n\
            <a href=\"sub%20dir/\">sub dir/</a>   21-Nov-2026 10:00    -\r\n\
            <a href=\"a%26b%23.txt\">a&amp;b#.txt</a>  21-Nov-2026 10:00   3\r\n\
            <a href=\"%C3%A9.bin\">é.bin</a>  21-Nov-2026 10:00   3\r\n</pre><hr></body></html>";
        assert_eq!(
            names(page),
            [dir("sub dir"), file("a&b#.txt"), file("é.bin")]
        );
    }

    #[test]
    fn apache() {
        let page = r#"<table><tr><th><a href="?C=N;O=D">Name</a></th></tr>
            <tr><td><a href="/models/">Parent Directory</a></td></tr>
            <tr><td valign="top"><A class=x HREF='model.safetensors'>model</A></td></tr>
            <tr><td><a href=config.json>c</a><a href="config.json">again</a></td></tr>"#;
        assert_eq!(
            names(page),
            [file("model.safetensors"), file("config.json")]
        );
    }

    #[test]
    fn python_and_caddy() {
        let page = r#"<ul><li><a href="a%20b.txt">a b.txt</a></li>
            <li><a href="link">link@</a></li><li><a href="d/">d/</a></li>
            <a href="./caddy.bin">x</a><a href="/models/m/absolute.bin">x</a></ul>"#;
        assert_eq!(
            names(page),
            [
                file("a b.txt"),
                file("link"),
                dir("d"),
                file("caddy.bin"),
                file("absolute.bin")
            ]
        );
    }

    #[test]
    fn nothing_leads_outside() {
        let page = r##"<a href="../../etc/passwd">x</a><a href="/etc/passwd">x</a>
            <a href="http://other/models/m/x">x</a><a href="//other/models/m/x">x</a>
            <a href="%2e%2e/x">x</a><a href="sub/../../y">x</a><a href="..">x</a>
            <a href="javascript:alert(1)">x</a><a href="mailto:x@y">x</a><a href="deep/er">x</a>
            <!-- <a href="commented">x</a> --><a name="x">x</a><abbr href="no">x</abbr>
            <a href="data:text/plain,x">x</a><a href="q?x=1">x</a><a href="#top">x</a>
            <a href="https://h/models/m/x">x</a><a href="\..\up">x</a><a href="">x</a>"##;
        assert_eq!(names(page), []);
        for bad in ["a%2fb", "a%00", "%ff"] {
            let page = format!("<a href=\"{bad}\">x</a>");
            let error = parse_html(&base(), page.as_bytes()).unwrap_err();
            assert_eq!(error, PageError::Name(bad.to_owned()));
        }
    }

    #[test]
    fn nginx_json() {
        let page = br#"[{"name":"d","type":"directory","mtime":"Sat, 21 Nov 2026 10:00:00 GMT"},
            {"name":"a b%.bin","type":"file","mtime":"x","size":7},
            {"name":"s","type":"other"}]"#;
        let children = parse_json(page).unwrap();
        assert_eq!(children.len(), 2);
        assert_eq!(children[0].name, "d");
        assert!(children[0].is_dir);
        assert_eq!(children[1].segment, "a%20b%25.bin");
        for bad in [
            r#"[{"name":"..","type":"file"}]"#,
            r#"[{"name":"a/b","type":"file"}]"#,
        ] {
            assert!(matches!(
                parse_json(bad.as_bytes()),
                Err(PageError::Name(_))
            ));
        }
        assert!(matches!(parse_json(b"{}"), Err(PageError::Json(_))));
    }

    proptest! {
        #[test]
        fn no_page_panics_and_every_name_is_one(
            page in r#"(<|>|a |A\n|href|=|"|'|/|\.\.|%2f|%2e|%00|&|#|x41|;|amp|!--|-->|é|z| ){0,40}"#,
        ) {
            if let Ok(children) = parse_html(&base(), page.as_bytes()) {
                for child in children {
                    prop_assert!(is_name(&child.name));
                    prop_assert!(!child.segment.contains(['/', '?', '#']));
                }
            }
        }

        #[test]
        fn no_bytes_panic(page in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse_html(&base(), &page);
            let _ = parse_json(&page);
        }

        #[test]
        fn every_name_comes_through(name in "[^/\0]{1,20}") {
            prop_assume!(is_name(&name));
            let segment = utf8_percent_encode(&name, SEGMENT).to_string();
            // A segment of dots alone has another meaning in URLs; no file can be named so.
            let page = format!("<a href=\"{segment}\">x</a>");
            let children = parse_html(&base(), page.as_bytes()).unwrap();
            prop_assert_eq!(children.len(), 1);
            prop_assert_eq!(&children[0].name, &name);
        }
    }
}
