//! limits: how many files this process may have open, and memory that it does not need any more.
//!
//! By default 1024, for the sake of programs that use select(2); the hard limit is what the system bears. A process that holds
//! the descriptors of thousands of mounts and connections takes all of that, and gives the programs that it starts what it
//! was given itself. Nothing here survives the process. Called first thing by `cli`, and by whoever starts programs.

use std::{io, os::unix::process::CommandExt as _, process::Command, sync::OnceLock};

/// What this process was given.
static GIVEN: OnceLock<libc::rlimit> = OnceLock::new();

/// Has this process open as many files as the system lets it (setrlimit(2)). Where that fails, it is logged.
pub fn raise_open_files() {
    if let Err(error) = raise() {
        tracing::warn!(%error, "the limit of open files stays as it is");
    }
}

/// Gives memory that was freed back to the system: the allocator keeps it otherwise.
pub fn give_memory_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim(3) has no preconditions and is thread-safe.
    unsafe {
        libc::malloc_trim(0);
    }
}

fn raise() -> io::Result<()> {
    let limit = now()?;
    let given = *GIVEN.get_or_init(|| limit);
    set(&libc::rlimit {
        rlim_cur: given.rlim_max,
        ..given
    })
}

fn now() -> io::Result<libc::rlimit> {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: it fills in the struct, which lives until it returns.
    match unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } {
        0 => Ok(limit),
        _ => Err(io::Error::last_os_error()),
    }
}

fn set(limit: &libc::rlimit) -> io::Result<()> {
    // SAFETY: it reads the struct, which lives until it returns.
    match unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, limit) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// How many files this process may have open; 0 where the system does not say.
pub fn open_files() -> u64 {
    now().map_or(0, |limit| limit.rlim_cur)
}

/// Has the program of `command` run with the limit that this process was given.
pub fn restore(command: &mut Command) {
    let Some(given) = GIVEN.get().copied() else {
        return;
    };
    // SAFETY: one system call, allowed between fork and exec, on a struct that the closure owns.
    unsafe { command.pre_exec(move || set(&given)) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_get_what_was_given() {
        let limit = |restored: bool| {
            let mut command = Command::new("sh");
            command.args(["-c", "ulimit -Sn; ulimit -Hn"]);
            if restored {
                restore(&mut command);
            }
            let said = command.output().unwrap().stdout;
            String::from_utf8(said).unwrap()
        };
        let given = limit(true);
        raise_open_files();
        let raised = limit(false);
        let (soft, hard) = raised.trim().split_once('\n').unwrap();
        assert_eq!(soft, hard);
        assert_eq!(limit(true), given);
        raise_open_files();
        assert_eq!(limit(true), given, "what it was given at first");
    }
}
