use std::process::ExitCode;

use super::{Context, output};

/// Print the configuration in force, as TOML
///
/// A file that is not valid is an error for every command; --check says just whether it is.
#[derive(clap::Args)]
pub(super) struct Args {
    /// Only check the file
    #[arg(long)]
    check: bool,
}

pub(super) fn run(context: &Context, args: Args) -> anyhow::Result<ExitCode> {
    // Reading the file checked it.
    let from = context.config_path.as_ref().map_or_else(
        || "no configuration file: defaults are in force".to_owned(),
        |path| format!("{} is valid", path.display()),
    );
    if args.check {
        output::line(from)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut config = context.config.clone();
    config.root = Some(context.root.clone());
    output::line(format!("# {from}"))?;
    output::text(toml::to_string(&config)?.trim_end())?;
    Ok(ExitCode::SUCCESS)
}
