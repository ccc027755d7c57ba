//! The configuration file: one TOML file, a section for each room, which owns its settings.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::{
    admin, csi, fetch, kube, mirror, mount, node, snapshotter, source,
    store::{self, TierConfig},
    telemetry,
};

/// Longest configuration file read, in bytes.
const MAX_FILE: u64 = 1 << 20;

/// All settings. Every field has a default; unknown ones are an error.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Where the store is; `--store` and `HEARTH_STORE` go before it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub root: Option<PathBuf>,
    pub store: store::Config,
    pub source: source::Config,
    pub fetch: fetch::Config,
    pub mount: mount::Config,
    pub agent: Agent,
    pub admin: admin::Config,
    pub snapshotter: snapshotter::Config,
    pub csi: csi::Config,
    pub mirror: mirror::Config,
    pub kube: kube::Config,
    /// What namespaces may see and keep.
    pub tenancy: node::TenancyConfig,
    /// Where spans go.
    pub trace: telemetry::Config,
    /// Read-only tiers below the store, in the order in which they are looked at.
    #[serde(rename = "tier", skip_serializing_if = "Vec::is_empty")]
    pub tiers: Vec<TierConfig>,
}

/// Settings of the agent as a whole: `[agent]`. Which faces it has is in their own sections.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Agent {
    /// What the cluster calls this node; by default what the environment says in `KUBE_NODE_NAME`, else
    /// the name of the host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node_name: Option<String>,
    /// The socket of the keeper (`hearth keeper`) that has the mounts of all faces: then they outlive the
    /// agent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keeper: Option<PathBuf>,
    /// Have the service manager keep the mounts and sockets instead (`FDSTORE=1` of systemd).
    pub fdstore: bool,
    /// Where the next agent asks this one to hand over to it: a unix socket, mode 0600.
    pub socket: PathBuf,
    /// What an agent does once another has taken over from it: it ends (false), or waits for SIGTERM. Where
    /// something starts again whatever ends, as the kubelet does, it has to wait.
    pub linger: bool,
    /// How long requests under way may take, in seconds, once the agent was told to end.
    #[serde(rename = "drain_seconds")]
    pub drain: u64,
}

impl Default for Agent {
    fn default() -> Self {
        Self {
            node_name: None,
            keeper: None,
            fdstore: false,
            socket: "/run/hearth/agent.sock".into(),
            linger: false,
            drain: 20,
        }
    }
}

impl Agent {
    /// What the cluster calls this node.
    pub fn node_name(&self) -> String {
        let said = || std::env::var("KUBE_NODE_NAME").ok();
        let host = || std::fs::read_to_string("/proc/sys/kernel/hostname").ok();
        let name = self.node_name.clone().or_else(said).or_else(host);
        name.unwrap_or_default().trim().to_owned()
    }
}

/// A configuration file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read the configuration {path}")]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("the configuration {path} is longer than 1 MiB")]
    TooLong { path: PathBuf },
    #[error("the configuration {path} is not valid:\n{message}")]
    Invalid { path: PathBuf, message: String },
}

impl Config {
    /// Reads a file.
    ///
    /// # Errors
    /// What cannot be read, is no TOML, or has unknown or wrong settings; the message points at
    /// the line.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let failed = |source| ConfigError::Read {
            path: path.to_owned(),
            source,
        };
        if std::fs::metadata(path).map_err(failed)?.len() > MAX_FILE {
            return Err(ConfigError::TooLong {
                path: path.to_owned(),
            });
        }
        let text = std::fs::read_to_string(path).map_err(failed)?;
        Self::parse(&text).map_err(|message| ConfigError::Invalid {
            path: path.to_owned(),
            message,
        })
    }

    /// Parses the text of a file; the error points at the line.
    ///
    /// # Errors
    /// As [`Config::read`].
    pub fn parse(text: &str) -> Result<Self, String> {
        let config: Self = toml::from_str(text).map_err(|e| e.to_string())?;
        let checked = config.tiers.iter().try_for_each(TierConfig::check);
        checked.map_err(|e| e.to_string())?;
        config.store.check().map_err(|e| e.to_string())?;
        config.fetch.check()?;
        config.trace.check().map_err(|e| e.to_string())?;
        Ok(config)
    }

    /// Where the configuration is looked for when nothing is said: `/etc/hearth/config.toml` for
    /// root, `$XDG_CONFIG_HOME/hearth/config.toml` for others.
    pub fn default_path() -> Option<PathBuf> {
        if nix::unistd::geteuid().is_root() {
            return Some("/etc/hearth/config.toml".into());
        }
        Some(xdg("XDG_CONFIG_HOME", ".config")?.join("hearth/config.toml"))
    }

    /// Where the store is when nothing is said: `/var/lib/hearth` for root, `$XDG_CACHE_HOME/hearth`
    /// for others.
    pub fn default_root() -> Option<PathBuf> {
        if nix::unistd::geteuid().is_root() {
            return Some("/var/lib/hearth".into());
        }
        Some(xdg("XDG_CACHE_HOME", ".cache")?.join("hearth"))
    }
}

fn xdg(variable: &str, fallback: &str) -> Option<PathBuf> {
    match std::env::var_os(variable) {
        Some(path) if Path::new(&path).is_absolute() => Some(path.into()),
        _ => Some(PathBuf::from(std::env::var_os("HOME")?).join(fallback)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_round_trip_and_mistakes_are_pointed_at() {
        let text = toml::to_string(&Config::default()).unwrap();
        assert_eq!(Config::parse(&text), Ok(Config::default()));
        assert_eq!(Config::parse(""), Ok(Config::default()));
        let tiers = "[[tier]]\npath = \"/a/*\"\nverify = \"once\"\nverify_rate = \"8MiB\"\n\n\
                     [[tier]]\nlabel = \"hearth\"\nmode = \"ro\"\n";
        let config = Config::parse(tiers).unwrap();
        assert_eq!(config.tiers.len(), 2);
        assert_eq!(config.tiers[1], TierConfig::labelled("hearth"));
        let text = toml::to_string(&config).unwrap();
        assert_eq!(Config::parse(&text), Ok(config));
        let error = Config::parse("[fetch]\nmax_conections = 3\n").unwrap_err();
        assert!(
            error.contains("max_conections") && error.contains("line 2"),
            "{error}"
        );
        for wrong in [
            "[fetch]\npatience_seconds = -1\n",
            "[fetch]\nverify = \"no\"\n",
            "[fetch]\nstall_seconds = 0\n",
            "[fetch]\nmax_connections = 0\n",
            "[fetch]\nmemory = \"1MiB\"\n",
            "[fetch]\nwarm_bandwidth = 0\n",
            "[store]\nlow_watermark = 2\n",
            "[store]\nhigh_watermark = nan\n",
            "[[tier]]\nmode = \"ro\"\n",
            "[[tier]]\npath = \"/t\"\nmode = \"rw\"\n",
            "[[tier]]\npath = \"/t\"\nlabel = \"hearth\"\n",
            "[[tier]]\npath = \"t\"\n",
            "[[tier]]\npath = \"/t[\"\n",
            "[[tier]]\nlabel = \"\"\n",
            "[[tier]]\nlabel = \"more than 16 bytes\"\n",
            "[[tier]]\nlabel = \"a/b\"\n",
            "[[tier]]\npath = \"/t\"\nverify_rate = 0\n",
            "[trace]\nendpoint = \"collector:4318\"\n",
            "x",
            "[",
        ] {
            assert!(Config::parse(wrong).is_err(), "{wrong}");
        }
    }
}
