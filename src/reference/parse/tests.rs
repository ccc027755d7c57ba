use proptest::prelude::*;

use super::*;

fn parse(text: &str) -> Reference {
    text.parse().unwrap_or_else(|e| panic!("{text}: {e}"))
}

#[test]
fn every_scheme_parses_to_its_parts() {
    let s3 = parse("s3://my.bucket-1/models/llama/?include=*.safetensors&exclude=a%20b&include=x");
    assert_eq!(
        s3.locator,
        Locator::S3(Bucket {
            bucket: "my.bucket-1".into(),
            prefix: "models/llama/".into()
        })
    );
    assert_eq!(s3.filter.include, ["*.safetensors", "x"]);
    assert_eq!(s3.filter.exclude, ["a b"]);
    assert_eq!(parse("s3://b"), parse("S3://b/"));
    assert!(matches!(parse("gs://b/k").locator, Locator::Gcs(b) if b.prefix == "k"));
    assert!(matches!(parse("az://c/p/").locator, Locator::Azure(b) if b.prefix == "p/"));
    // Keys are not percent-decoded.
    assert!(matches!(parse("s3://b/a%20b+c#d").locator, Locator::S3(b) if b.prefix == "a%20b+c#d"));
    for text in [
        "file:///a%20b/c/",
        "file:///a b//c",
        "file://localhost/a%20b/c",
    ] {
        assert_eq!(parse(text).locator, Locator::File("/a b/c".into()));
        assert_eq!(parse(text).to_string(), "file:///a%20b/c");
    }
    assert_eq!(parse("file:///").locator, Locator::File("/".into()));
}

#[test]
fn hub_references_parse_as_hffilesystem_does() {
    let hub = |text| match parse(text).locator {
        Locator::Hub(repo) => (
            repo.kind,
            repo.id,
            repo.revision.unwrap_or_default(),
            repo.path,
        ),
        other => panic!("{other}"),
    };
    let own = |kind, id: &str, rev: &str, path: &str| {
        (kind, id.to_owned(), rev.to_owned(), path.to_owned())
    };
    let model = HubKind::Model;
    for (text, want) in [
        ("hf://org/name", own(model, "org/name", "", "")),
        ("hf://org/name@main", own(model, "org/name", "", "")),
        (
            "hf://org/name@v1.0/sub/file@2x",
            own(model, "org/name", "v1.0", "sub/file@2x"),
        ),
        (
            "hf://org/name@refs%2Fpr%2F1/x",
            own(model, "org/name", "refs/pr/1", "x"),
        ),
        (
            "hf://org/name@refs/pr/12",
            own(model, "org/name", "refs/pr/12", ""),
        ),
        (
            "hf://org/name@refs/convert/parquet/d",
            own(model, "org/name", "refs/convert/parquet", "d"),
        ),
        (
            "hf://org/name@refs/pr/x",
            own(model, "org/name", "refs", "pr/x"),
        ),
        (
            "hf://org/name@feature%2Fa/",
            own(model, "org/name", "feature/a", ""),
        ),
        (
            "hf://datasets/org/d_1",
            own(HubKind::Dataset, "org/d_1", "", ""),
        ),
        ("hf://spaces/org/s@x", own(HubKind::Space, "org/s", "x", "")),
    ] {
        assert_eq!(hub(text), want, "{text}");
    }
    assert_eq!(
        parse("hf://org/name@refs/pr/1/x").to_string(),
        "hf://org/name@refs%2Fpr%2F1/x"
    );
}

#[test]
fn secrets_of_urls_are_kept_apart() {
    for (text, public) in [
        ("https://u:SECRET@h/a", "https://h/a"),
        (
            "https://h/a?x=1&token=SECRET&include=*.bin",
            "https://h/a?x=1&include=*.bin",
        ),
        (
            "https://b.s3.amazonaws.com/k?X-Amz-Signature=SECRET&X-Amz-Date=1&versionId=3",
            "https://b.s3.amazonaws.com/k?versionId=3",
        ),
        (
            "https://a.blob.core.windows.net/c/b?sv=1&se=2&sig=SECRET",
            "https://a.blob.core.windows.net/c/b",
        ),
        (
            "https://h/a?Expires=1&Signature=SECRET&Key-Pair-Id=K&Policy=P",
            "https://h/a",
        ),
        ("https://h/a?X%2Damz-security-token=SECRET", "https://h/a"),
        ("https://h/a?hf_token=SECRET#frag", "https://h/a"),
    ] {
        let reference = parse(text);
        assert_eq!(reference.to_string(), public);
        assert!(!format!("{reference:?}").contains("SECRET"));
        let Locator::Http(url) = &reference.locator else {
            panic!("{text}");
        };
        let secret = url.secret.as_ref().unwrap().expose();
        assert!(
            secret.contains("SECRET") && !secret.contains("include"),
            "{secret}"
        );
        assert_eq!(parse(public), reference);
    }
    for plain in [
        "http://h:8080/a/b%20c?rev=1&se=2",
        "https://h/dir/",
        "https://[::1]/x",
    ] {
        let Locator::Http(url) = parse(plain).locator else {
            panic!("{plain}");
        };
        assert!(url.secret.is_none());
        assert_eq!(url.public.as_str(), plain);
    }
}

#[test]
fn nonsense_gets_an_error_that_shows_no_secret() {
    let long = format!("s3://b/{}", "x".repeat(MAX_REFERENCE));
    let grows = format!("file:///{}", " ".repeat(MAX_REFERENCE / 2));
    for (text, part) in [
        ("", "expected hf://"),
        ("org/name", "expected hf://"),
        ("oci://registry/repo:tag", "no registry host"),
        ("ftp://h/x", "unknown scheme"),
        ("s3://", "name of a bucket"),
        ("s3:///x", "name of a bucket"),
        ("s3://a:SECRET@bucket/x", "bucket name"),
        ("s3://A:SEC/RET@bucket/x", "bucket name"),
        ("s3://b/a/../c", "\"..\""),
        ("s3://b//c", "empty component"),
        ("s3://b/c//", "empty component"),
        ("s3://b/c?versionId=SECRET", "unknown parameter"),
        ("s3://b/c?include=", "found nothing"),
        ("s3://b/c?include=[", "not a glob"),
        ("s3://b/a\nb", "control character"),
        ("file:///a%00b", "control character"),
        ("file:///a%FFb", "not UTF-8"),
        ("file://host/a", "absolute path"),
        ("file:///a/%2e%2e/b", "\"..\""),
        ("http://", "expected https://host/path"),
        ("https://u:SECRET@/x", "expected https://host/path"),
        ("https://h/a/%2E%2e/b?token=SECRET", "\"..\""),
        (
            "https://h:99999/?token=SECRET",
            "expected https://host/path",
        ),
        ("hf://name", "expected hf://"),
        ("hf://org/", "expected hf://org/name"),
        ("hf://org/na--me", "expected hf://org/name"),
        ("hf://SECRET@org/name", "expected hf://org/name"),
        ("hf://org/name@", "after @"),
        ("hf://org/name@a%2F..%2Fb", "after @"),
        ("hf://org/name/a/../b", "\"..\""),
        (&long, "longer than"),
        (&grows, "longer than"),
    ] {
        let error = text.parse::<Reference>().unwrap_err().to_string();
        assert!(error.contains(part), "{text}: {error}");
        assert!(!error.contains("SEC"), "{error}");
        assert!(error.len() < 500, "{error}");
    }
}

proptest! {
    #[test]
    fn any_text_parses_or_fails(text in any::<String>()) {
        let _ = text.parse::<Reference>();
    }

    #[test]
    fn any_bytes_after_a_scheme_parse_or_fail_and_round_trip(
        scheme in prop::sample::select(vec!["s3", "gs", "az", "http", "https", "file", "hf", "hf://a/b@"]),
        rest in prop::collection::vec(prop::sample::select(
            "aZ0/.@?&=%:#*+-_[]{} ,\\é2eF!~^refspr".chars().collect::<Vec<_>>()), 0..40),
    ) {
        let rest: String = rest.into_iter().collect();
        let text = if scheme.contains(':') { format!("{scheme}{rest}") } else { format!("{scheme}://{rest}") };
        if let Ok(reference) = text.parse::<Reference>() {
            let shown = reference.to_string();
            let again = shown.parse::<Reference>();
            prop_assert_eq!(again.as_ref().map(ToString::to_string), Ok(shown.clone()));
            prop_assert_eq!(again, Ok(reference), "{}", shown);
        }
    }

    #[test]
    fn likely_references_round_trip(
        head in prop::sample::select(vec![
            "s3://bucket/", "gs://bucket/", "az://c/", "https://h/", "file:///", "hf://o/n/",
            "hf://datasets/o/n@", "hf://o/n@refs/pr/1/"]),
        path in "[a-zA-Z0-9 %+#é/_.-]{0,30}",
        globs in prop::collection::vec(("(include|exclude)", "[a-z*?/.{},& +%#é-]{1,12}"), 0..4),
    ) {
        let mut text = format!("{head}{path}");
        for (at, (name, glob)) in globs.iter().enumerate() {
            let glob = utf8_percent_encode(glob, NON_ALPHANUMERIC);
            text.push_str(&format!("{}{name}={glob}", if at == 0 { '?' } else { '&' }));
        }
        if let Ok(reference) = text.parse::<Reference>() {
            let shown = reference.to_string();
            prop_assert_eq!(shown.parse::<Reference>(), Ok(reference), "{}", shown);
        }
    }
}
