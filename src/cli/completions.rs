use std::process::ExitCode;

use clap::CommandFactory as _;

/// Print completions for a shell
///
/// For bash: hearth completions bash > /etc/bash_completion.d/hearth
#[derive(clap::Args)]
pub(super) struct Args {
    shell: clap_complete::Shell,
}

pub(super) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let mut command = super::Cli::command();
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut command, "hearth", &mut text);
    super::output::text(String::from_utf8_lossy(&text).trim_end())?;
    Ok(ExitCode::SUCCESS)
}
