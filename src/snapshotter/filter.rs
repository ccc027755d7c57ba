//! containerd's filters (its package `filters`): `kind==active,labels."a.b"==c`. All selectors of
//! one filter must match; of several filters one.

use regex::Regex;

use super::records::Record;

/// Longest filter, in bytes: two label values, quoted, and some.
const MAX_FILTER: usize = 64 << 10;

/// What to list.
#[derive(Debug)]
pub(super) struct Filters(Vec<Vec<Selector>>);

#[derive(Debug)]
struct Selector {
    field: Vec<String>,
    test: Test,
}

#[derive(Debug)]
enum Test {
    Present,
    Equal(String),
    NotEqual(String),
    Matches(Regex),
}

impl Filters {
    /// Parses each of `texts`; the error says what is wrong with which.
    pub(super) fn parse(texts: &[String]) -> Result<Self, String> {
        let parse = |text: &String| {
            if text.len() > MAX_FILTER {
                return Err(format!("a filter is longer than {MAX_FILTER} bytes"));
            }
            Parser { rest: text }
                .selectors()
                .map_err(|error| format!("filter {text:?}: {error}"))
        };
        texts.iter().map(parse).collect::<Result<_, _>>().map(Self)
    }

    /// Whether `record` is to be listed.
    pub(super) fn matches(&self, record: &Record) -> bool {
        let all = |selectors: &Vec<Selector>| selectors.iter().all(|s| s.matches(record));
        self.0.is_empty() || self.0.iter().any(all)
    }
}

impl Selector {
    fn matches(&self, record: &Record) -> bool {
        let value = match self.field[0].as_str() {
            "kind" => Some(record.kind.name()),
            "name" => Some(record.name.as_str()),
            "parent" => Some(record.parent.as_str()),
            "labels" => {
                let label = record.labels.get(&self.field[1..].join("."));
                label.map(String::as_str)
            }
            _ => None,
        };
        match &self.test {
            Test::Present => value.is_some(),
            Test::Equal(wanted) => value == Some(wanted),
            // As in containerd, what is not there is empty here.
            Test::NotEqual(other) => value.unwrap_or_default() != other,
            Test::Matches(regex) => regex.is_match(value.unwrap_or_default()),
        }
    }
}

struct Parser<'a> {
    rest: &'a str,
}

impl<'a> Parser<'a> {
    fn selectors(mut self) -> Result<Vec<Selector>, String> {
        let mut found = Vec::new();
        if self.rest.is_empty() {
            return Ok(found); // matches all
        }
        loop {
            found.push(self.selector()?);
            if self.rest.is_empty() {
                return Ok(found);
            }
            self.expect(",")?;
        }
    }

    fn selector(&mut self) -> Result<Selector, String> {
        let mut field = vec![self.field()?];
        while self.eat(".") {
            field.push(self.field()?);
        }
        let test = if self.rest.is_empty() || self.rest.starts_with(',') {
            Test::Present
        } else if self.eat("==") {
            Test::Equal(self.value(false)?)
        } else if self.eat("!=") {
            Test::NotEqual(self.value(false)?)
        } else if self.eat("~=") {
            let value = self.value(true)?;
            let regex = regex::RegexBuilder::new(&value).size_limit(1 << 20).build();
            Test::Matches(regex.map_err(|e| e.to_string())?)
        } else {
            return Err(format!("expected ==, != or ~= at {:?}", self.rest));
        };
        Ok(Selector { field, test })
    }

    fn field(&mut self) -> Result<String, String> {
        if self.rest.starts_with('"') {
            return self.quoted();
        }
        let name = self.take_while(|c| c.is_ascii_alphanumeric() || c == '_');
        if !name.starts_with(|c: char| c.is_ascii_alphabetic()) {
            return Err(format!("expected a field at {:?}", self.rest));
        }
        Ok(name.to_owned())
    }

    /// A regular expression may also stand between slashes or bars, and is taken as it is there.
    fn value(&mut self, is_regex: bool) -> Result<String, String> {
        if self.rest.starts_with('"') {
            return self.quoted();
        }
        if is_regex
            && let Some(quote) = self.rest.chars().next().filter(|c| "/|".contains(*c))
            && let Some((value, rest)) = self.rest[1..].split_once(quote)
        {
            self.rest = rest;
            return Ok(value.to_owned());
        }
        let value = self.take_while(|c| c != ',' && !c.is_whitespace());
        match value.is_empty() {
            true => Err(format!("expected a value at {:?}", self.rest)),
            false => Ok(value.to_owned()),
        }
    }

    /// A string as the Go language writes it (Go specification, "String literals").
    fn quoted(&mut self) -> Result<String, String> {
        let unfinished = || "a quoted string has no end".to_owned();
        let mut value = Vec::new();
        let mut chars = self.rest.char_indices().skip(1);
        while let Some((at, c)) = chars.next() {
            match c {
                '"' => {
                    self.rest = &self.rest[at + 1..];
                    return String::from_utf8(value).map_err(|_| "not UTF-8".to_owned());
                }
                '\\' => {
                    let (_, escape) = chars.next().ok_or_else(unfinished)?;
                    let mut number = |digits: usize, radix: u32, first: Option<char>| {
                        let rest = digits - usize::from(first.is_some());
                        let more = chars.by_ref().take(rest).map(|(_, c)| c);
                        let text: String = first.into_iter().chain(more).collect();
                        match text.len() == digits && text.chars().all(|c| c.is_digit(radix)) {
                            true => u32::from_str_radix(&text, radix).ok(),
                            false => None,
                        }
                    };
                    let wrong = || format!("\\{escape} is no escape sequence");
                    let mut utf8 = [0; 4];
                    match escape {
                        '\\' | '"' | '\'' => value.push(escape as u8),
                        'a' => value.push(7),
                        'b' => value.push(8),
                        'f' => value.push(12),
                        'n' => value.push(b'\n'),
                        'r' => value.push(b'\r'),
                        't' => value.push(b'\t'),
                        'v' => value.push(11),
                        'x' => value.push(number(2, 16, None).ok_or_else(wrong)? as u8),
                        '0'..='7' => {
                            let byte = number(3, 8, Some(escape)).ok_or_else(wrong)?;
                            value.push(u8::try_from(byte).map_err(|_| wrong())?);
                        }
                        'u' | 'U' => {
                            let digits = if escape == 'u' { 4 } else { 8 };
                            let c = number(digits, 16, None).and_then(char::from_u32);
                            let c = c.ok_or_else(wrong)?;
                            value.extend_from_slice(c.encode_utf8(&mut utf8).as_bytes());
                        }
                        _ => return Err(wrong()),
                    }
                }
                c => value.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
            }
        }
        Err(unfinished())
    }

    fn take_while(&mut self, wanted: impl Fn(char) -> bool) -> &'a str {
        let end = self.rest.find(|c| !wanted(c)).unwrap_or(self.rest.len());
        let (taken, rest) = self.rest.split_at(end);
        self.rest = rest;
        taken
    }

    fn eat(&mut self, token: &str) -> bool {
        match self.rest.strip_prefix(token) {
            Some(rest) => {
                self.rest = rest;
                true
            }
            None => false,
        }
    }

    fn expect(&mut self, token: &str) -> Result<(), String> {
        match self.eat(token) {
            true => Ok(()),
            false => Err(format!("expected {token:?} at {:?}", self.rest)),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::snapshotter::Kind;

    fn matches(filters: &[&str]) -> bool {
        let mut record = Record::new(1, "name/1", "parent one", Kind::Active);
        let label = |k: &str, v: &str| (k.to_owned(), v.to_owned());
        record.labels = [
            label("containerd.io/snapshot.ref", "sha256:ab"),
            label("plain", "x,\"y\""),
        ]
        .into();
        let filters: Vec<String> = filters.iter().map(|f| (*f).to_owned()).collect();
        Filters::parse(&filters).unwrap().matches(&record)
    }

    #[test]
    fn the_corpus() {
        let record = Record::new(1, "name", "", Kind::View);
        crate::corpus::replay("corpus/filter", |input| {
            let text = String::from_utf8_lossy(input).into_owned();
            if let Ok(filters) = Filters::parse(&[text]) {
                filters.matches(&record);
            }
        });
    }

    #[test]
    fn selectors_are_understood_as_containerd_does() {
        for yes in [
            &[] as &[&str],
            &[""],
            &["kind==active"],
            &["kind==view", "kind==active"],
            &["name~=^name/[0-9]$"],
            &["name~=/^n.*1$/,kind!=view"],
            &[r#"parent=="parent one""#],
            &[r#"labels."containerd.io/snapshot.ref"==sha256:ab,parent=="parent one""#],
            &[r#"labels.plain=="x,\"y\"""#],
            &[r#"labels.plain=="\x78,\u0022\171\"""#],
            &["labels.plain"],
            &["labels.none!=1"],
            &["unknown!=1"],
            &["labels.none~=^$"],
        ] {
            assert!(matches(yes), "{yes:?}");
        }
        for no in [
            &["kind==committed"] as &[&str],
            &["kind==active,name==other"],
            &["labels.none"],
            &["labels.none==1"],
            &["unknown"],
            &["parent~=^one"],
        ] {
            assert!(!matches(no), "{no:?}");
        }
    }

    proptest! {
        #[test]
        fn nothing_panics_and_quoted_values_come_back(
            text in "\\PC{0,40}",
            filter in r#"(kind|name|labels|[a-z"\\.,=~!/|x0-9]){0,30}"#,
        ) {
            let _ = Filters::parse(&[text.clone(), filter]);
            let quoted = text.replace('\\', r"\\").replace('"', r#"\""#);
            let equal = Filters::parse(&[format!("name==\"{quoted}\"")]).unwrap();
            let mut record = Record::new(1, &text, "", Kind::View);
            prop_assert!(equal.matches(&record));
            record.name.push('x');
            prop_assert!(!equal.matches(&record));
        }
    }

    #[test]
    fn what_is_no_filter_is_refused() {
        for wrong in [
            "kind=active",
            "==x",
            "kind==",
            "kind==active,",
            "kind==active name",
            "a..b",
            "1a==x",
            r#"name=="x"#,
            r#"name=="\q""#,
            r#"name=="\x1""#,
            r#"name=="\777""#,
            r#"name=="\xff""#,
            r#"name=="\ud800""#,
            "name~=(",
            "name~=(a{1000}){1000}",
        ] {
            let error = Filters::parse(&[wrong.to_owned()]).unwrap_err();
            assert!(error.contains("filter"), "{error}");
        }
        assert!(Filters::parse(&["x".repeat(MAX_FILTER + 1)]).is_err());
    }
}
