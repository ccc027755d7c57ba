//! Globs that choose files of a reference.

use globset::{Glob, GlobBuilder, GlobSet, GlobSetBuilder};

use super::{Filter, MAX_GLOB, MAX_GLOBS, ParseReferenceError};

/// A compiled [`Filter`].
#[derive(Debug, Clone)]
pub struct Matcher {
    include: Option<Globs>,
    exclude: Option<Globs>,
}

/// Globs matched against whole paths, and those without `/` against file names too.
#[derive(Debug, Clone)]
struct Globs {
    paths: GlobSet,
    names: GlobSet,
}

impl Filter {
    /// Whether it lets every file pass.
    pub const fn is_empty(&self) -> bool {
        self.include.is_empty() && self.exclude.is_empty()
    }

    /// Compiles the globs. As with `fnmatch` in the Hub's tools, `*` also matches `/`, a glob that
    /// ends in `/` means all below, and a glob without `/` matches a file name at any depth.
    ///
    /// # Errors
    /// Globs that are malformed, absolute, too long or too many.
    pub fn matcher(&self) -> Result<Matcher, ParseReferenceError> {
        if self.include.len() + self.exclude.len() > MAX_GLOBS {
            return Err(ParseReferenceError::new(
                "include and exclude",
                format!("more than {MAX_GLOBS} globs"),
            ));
        }
        Ok(Matcher {
            include: Globs::new(&self.include)?,
            exclude: Globs::new(&self.exclude)?,
        })
    }
}

impl Matcher {
    /// Whether the file at `path` (relative, without leading slash) is meant: it matches an
    /// include glob or there are none, and it matches no exclude glob.
    pub fn matches(&self, path: &str) -> bool {
        self.include.as_ref().is_none_or(|g| g.matches(path))
            && !self.exclude.as_ref().is_some_and(|g| g.matches(path))
    }
}

impl Globs {
    fn new(globs: &[String]) -> Result<Option<Self>, ParseReferenceError> {
        if globs.is_empty() {
            return Ok(None);
        }
        let mut paths = GlobSetBuilder::new();
        let mut names = GlobSetBuilder::new();
        for text in globs {
            let glob = compile(text).map_err(|why| ParseReferenceError::new(text, why))?;
            if !text.contains('/') {
                names.add(glob.clone());
            }
            paths.add(glob);
        }
        let build = |set: GlobSetBuilder| {
            set.build()
                .map_err(|e| ParseReferenceError::new(&globs.join(" "), e.to_string()))
        };
        Ok(Some(Self {
            paths: build(paths)?,
            names: build(names)?,
        }))
    }

    fn matches(&self, path: &str) -> bool {
        let name = path.rsplit('/').next().unwrap_or(path);
        self.paths.is_match(path) || self.names.is_match(name)
    }
}

fn compile(text: &str) -> Result<Glob, String> {
    if text.is_empty() {
        return Err("expected a glob such as *.safetensors, found nothing".into());
    }
    if text.len() > MAX_GLOB {
        return Err(format!("a glob is longer than {MAX_GLOB} bytes"));
    }
    if text.starts_with('/') {
        return Err("globs are relative to the reference: write it without leading /".into());
    }
    if text.chars().any(char::is_control) {
        return Err("a glob has a control character".into());
    }
    let all_below = text.ends_with('/').then(|| format!("{text}*"));
    GlobBuilder::new(all_below.as_deref().unwrap_or(text))
        .literal_separator(false)
        .build()
        .map_err(|e| format!("not a glob: {}", e.kind()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matcher(include: &[&str], exclude: &[&str]) -> Matcher {
        let own = |globs: &[&str]| globs.iter().map(|g| (*g).to_owned()).collect();
        let filter = Filter {
            include: own(include),
            exclude: own(exclude),
        };
        filter.matcher().unwrap()
    }

    #[test]
    fn globs_match_as_users_of_the_hub_expect() {
        let m = matcher(&["*.safetensors", "config.json"], &["original/*"]);
        for yes in [
            "a.safetensors",
            "x/y/a.safetensors",
            "config.json",
            "x/config.json",
        ] {
            assert!(m.matches(yes), "{yes}");
        }
        for no in [
            "a.bin",
            "original/a.safetensors",
            "original/x/a.safetensors",
            "aconfig.json",
        ] {
            assert!(!m.matches(no), "{no}");
        }
        let m = matcher(&["onnx/"], &[]);
        assert!(m.matches("onnx/a/b") && !m.matches("onnx"));
        assert!(matcher(&[], &["*.bin"]).matches("a.txt"));
        assert!(matcher(&[], &[]).matches("anything at all"));
        assert!(matcher(&["*.{json,txt}"], &[]).matches("a/b.txt"));
    }

    #[test]
    fn bad_globs_are_refused() {
        for bad in ["", "[", "{a", "/abs", "a\nb", &"x".repeat(MAX_GLOB + 1)] {
            let filter = Filter {
                include: vec![bad.to_owned()],
                exclude: Vec::new(),
            };
            let error = filter.matcher().unwrap_err().to_string();
            assert!(error.len() < 300, "{error}");
        }
        let many = Filter {
            include: vec!["a".to_owned(); MAX_GLOBS + 1],
            exclude: Vec::new(),
        };
        assert!(many.matcher().is_err());
    }
}
