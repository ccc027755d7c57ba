//! The profile files of the AWS tools: `~/.aws/credentials` and `~/.aws/config`.
//!
//! Static keys, region and endpoint of the profile `AWS_PROFILE` are read; single sign-on, assumed
//! roles and credential processes are not.

use std::{
    env, fmt, fs,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use object_store::{CredentialProvider, aws::AwsCredential};
use parking_lot::Mutex;
use zeroize::{Zeroize as _, Zeroizing};

/// Largest file that is read, in bytes.
const MAX_FILE: u64 = 1 << 20;

/// How long the keys of a profile are used without a look at its files.
const FRESH: Duration = Duration::from_secs(2);

/// The keys of a profile, which somebody may replace in its files at any time.
pub(super) struct Keys {
    load: fn() -> Profile,
    last: Mutex<(Instant, Arc<AwsCredential>)>,
}

impl Keys {
    /// The keys of a profile that was loaded; `None` where there are none.
    pub(super) fn of(profile: &Profile) -> Option<Self> {
        Some(Self {
            load,
            last: Mutex::new((Instant::now(), Arc::new(profile.keys()?))),
        })
    }
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Keys of a profile")
    }
}

#[async_trait::async_trait]
impl CredentialProvider for Keys {
    type Credential = AwsCredential;

    async fn get_credential(&self) -> object_store::Result<Arc<AwsCredential>> {
        let mut last = self.last.lock();
        if last.0.elapsed() >= FRESH {
            // Two small files; where they are being written, the keys stay.
            if let Some(found) = (self.load)().keys() {
                last.1 = Arc::new(found);
            }
            last.0 = Instant::now();
        }
        Ok(Arc::clone(&last.1))
    }
}

/// What a profile sets.
#[derive(Default)]
pub(super) struct Profile {
    pub(super) access_key_id: Option<String>,
    pub(super) secret_access_key: Option<String>,
    pub(super) session_token: Option<String>,
    pub(super) region: Option<String>,
    pub(super) endpoint_url: Option<String>,
}

/// The profile that the environment names; empty where there is none.
pub(super) fn load() -> Profile {
    let name = env::var("AWS_PROFILE")
        .ok()
        .filter(|name| !name.is_empty())
        .unwrap_or_else(|| "default".to_owned());
    let mut profile = Profile::default();
    // What the credentials file says comes first.
    for (variable, file, section) in [
        ("AWS_SHARED_CREDENTIALS_FILE", "credentials", name.clone()),
        ("AWS_CONFIG_FILE", "config", format!("profile {name}")),
    ] {
        if let Some(text) = read(variable, file) {
            profile.merge(&text, &section, &name);
        }
    }
    profile
}

fn read(variable: &str, file: &str) -> Option<Zeroizing<String>> {
    let path = match env::var_os(variable) {
        Some(path) => PathBuf::from(path),
        None => PathBuf::from(env::var_os("HOME")?).join(".aws").join(file),
    };
    let small = fs::metadata(&path).is_ok_and(|meta| meta.is_file() && meta.len() <= MAX_FILE);
    let text = small.then(|| fs::read_to_string(&path).ok()).flatten();
    text.map(Zeroizing::new)
}

impl Drop for Profile {
    fn drop(&mut self) {
        self.secret_access_key.zeroize();
        self.session_token.zeroize();
    }
}

impl Profile {
    fn keys(&self) -> Option<AwsCredential> {
        Some(AwsCredential {
            key_id: self.access_key_id.clone()?,
            secret_key: self.secret_access_key.clone()?,
            token: self.session_token.clone(),
        })
    }

    /// Takes what is not set yet from the section `[section]` or, for the default profile, `[name]`.
    fn merge(&mut self, text: &str, section: &str, name: &str) {
        let mut inside = false;
        for line in text.lines() {
            // Indented lines are settings of a service, such as `s3 =`.
            if line.starts_with([' ', '\t', '#', ';']) {
                continue;
            }
            if let Some(title) = line
                .trim()
                .strip_prefix('[')
                .and_then(|l| l.strip_suffix(']'))
            {
                let title = title.trim();
                inside = title == section || (name == "default" && title == name);
                continue;
            }
            let Some((key, value)) = line.split_once('=').filter(|_| inside) else {
                continue;
            };
            let field = match key.trim().to_ascii_lowercase().as_str() {
                "aws_access_key_id" => &mut self.access_key_id,
                "aws_secret_access_key" => &mut self.secret_access_key,
                "aws_session_token" => &mut self.session_token,
                "region" => &mut self.region,
                "endpoint_url" => &mut self.endpoint_url,
                _ => continue,
            };
            let value = value.trim();
            if field.is_none() && !value.is_empty() {
                *field = Some(value.to_owned());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn keys_that_were_replaced_are_read_anew() {
        use std::sync::atomic::{AtomicU32, Ordering};
        static ASKED: AtomicU32 = AtomicU32::new(0);
        let load = || {
            let mut profile = Profile::default();
            let key = match ASKED.fetch_add(1, Ordering::SeqCst) {
                0 => "old",
                1 => return profile,
                _ => "new",
            };
            profile.access_key_id = Some(key.to_owned());
            profile.secret_access_key = Some("s".to_owned());
            profile
        };
        let mut keys = Keys::of(&load()).unwrap();
        keys.load = load;
        for wanted in ["old", "old", "new"] {
            let fresh = keys.get_credential().await.unwrap();
            let again = keys.get_credential().await.unwrap();
            assert_eq!((&*again.key_id, &*fresh.key_id), (wanted, wanted));
            let mut last = keys.last.lock();
            last.0 = last.0.checked_sub(FRESH).unwrap();
        }
        assert_eq!(ASKED.load(Ordering::SeqCst), 3);
        assert!(!format!("{keys:?}").contains("new"));
    }

    #[test]
    fn sections_are_kept_apart() {
        let mut profile = Profile::default();
        profile.merge(
            "[other]\naws_access_key_id=no\n[work]\n# c\naws_access_key_id = AK\n\
             aws_secret_access_key=a=b\n[last]\nregion = no",
            "work",
            "work",
        );
        profile.merge(
            "[default]\nregion = no\n[profile work]\nregion = eu-1\naws_access_key_id = late\n\
             s3 =\n  endpoint_url = nested\n",
            "profile work",
            "work",
        );
        assert_eq!(profile.access_key_id.as_deref(), Some("AK"));
        assert_eq!(profile.secret_access_key.as_deref(), Some("a=b"));
        assert_eq!(profile.region.as_deref(), Some("eu-1"));
        assert_eq!(profile.endpoint_url, None);
    }
}
