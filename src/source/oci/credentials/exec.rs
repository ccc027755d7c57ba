//! Runs a helper: no shell, bounded time and output, no way to a terminal.

use std::{
    io::{Read as _, Write as _},
    os::unix::process::CommandExt as _,
    path::Path,
    process::{Child, Command, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use zeroize::Zeroizing;

use crate::limits;

/// Largest answer, in bytes.
const MAX_OUTPUT: u64 = 1 << 20;
/// Largest question: what a pipe takes without a reader.
const MAX_INPUT: usize = 32 << 10;
/// How often it is looked whether the helper has ended.
const TICK: Duration = Duration::from_millis(5);

/// What a helper answered. Not `Debug`: holds secrets.
pub(super) struct Output {
    pub(super) success: bool,
    pub(super) stdout: Zeroizing<Vec<u8>>,
}

/// A helper that is killed, with all it has started, unless it has ended.
struct Running {
    child: Child,
    /// Whether its end was seen; its process group may be another's then.
    ended: bool,
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.ended {
            if let Ok(group) = i32::try_from(self.child.id()) {
                let _ = killpg(Pid::from_raw(group), Signal::SIGKILL);
            }
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// Runs `program` (found in `PATH` where it has no slash) and gives it `input`. Blocks.
///
/// # Errors
/// What went wrong, as the end of a sentence that begins with the program's name.
pub(super) fn run(
    program: &Path,
    arguments: &[&str],
    variables: &[(String, String)],
    input: &[u8],
    limit: Duration,
) -> Result<Output, String> {
    if input.len() > MAX_INPUT {
        return Err("would be asked too long a question".into());
    }
    let deadline = Instant::now() + limit;
    let mut command = Command::new(program);
    command
        .args(arguments)
        .envs(variables.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        // What it complains about may hold secrets, and nobody reads it.
        .stderr(Stdio::null())
        .process_group(0);
    limits::restore(&mut command);
    let child = command.spawn().map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => "is not there".to_owned(),
        _ => format!("cannot be run ({error})"),
    })?;
    let mut running = Running {
        child,
        ended: false,
    };
    let (stdin, stdout) = (running.child.stdin.take(), running.child.stdout.take());
    if let Some(mut stdin) = stdin {
        // A helper need not read it.
        let _ = stdin.write_all(input);
    }
    let (sender, receiver) = mpsc::sync_channel(1);
    if let Some(stdout) = stdout {
        std::thread::spawn(move || {
            // Not grown bit by bit: what is left behind then is not overwritten.
            let mut bytes = Zeroizing::new(Vec::with_capacity(64 << 10));
            let read = stdout.take(MAX_OUTPUT + 1).read_to_end(&mut bytes);
            let _ = sender.send(read.map(|_| bytes));
        });
    }
    let too_slow = || format!("gave no answer for {limit:?}");
    let stdout = receiver
        .recv_timeout(limit)
        .map_err(|_| too_slow())?
        .map_err(|error| format!("cannot be read ({error})"))?;
    if stdout.len() as u64 > MAX_OUTPUT {
        return Err("answered with more than 1 MiB".into());
    }
    loop {
        match running.child.try_wait() {
            Ok(Some(status)) => {
                running.ended = true;
                let success = status.success();
                return Ok(Output { success, stdout });
            }
            Ok(None) if Instant::now() < deadline => std::thread::sleep(TICK),
            Ok(None) => return Err(too_slow()),
            Err(error) => return Err(format!("cannot be waited for ({error})")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str, limit: u64) -> Result<Output, String> {
        let variables = [("GREETING".to_owned(), "hello".to_owned())];
        let limit = Duration::from_millis(limit);
        run(
            Path::new("sh"),
            &["-c", script],
            &variables,
            b"question\n",
            limit,
        )
    }

    #[test]
    fn question_and_answer() {
        let output = sh("read q; echo $GREETING $q; exit 3", 10_000).unwrap();
        assert_eq!(*output.stdout, b"hello question\n");
        assert!(!output.success);
        assert!(sh("exec true", 10_000).unwrap().success);
    }

    #[test]
    fn helpers_are_bounded() {
        let begun = Instant::now();
        for script in ["sleep 100", "sleep 100 & echo x", "exec >&-; sleep 100"] {
            let error = sh(script, 300).err().unwrap();
            assert!(error.contains("no answer"), "{error}");
        }
        assert!(begun.elapsed() < Duration::from_secs(20));
        let error = sh("exec cat /dev/zero", 20_000).err().unwrap();
        assert!(error.contains("1 MiB"), "{error}");
        let nowhere = Path::new("/nowhere/at-all");
        let error = run(nowhere, &[], &[], b"", Duration::from_secs(1))
            .err()
            .unwrap();
        assert_eq!(error, "is not there");
        let long = vec![0; MAX_INPUT + 1];
        assert!(run(Path::new("true"), &[], &[], &long, Duration::from_secs(1)).is_err());
    }
}
