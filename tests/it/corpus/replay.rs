//! Replays a corpus: what a parser was given once is given to it again, as it is and changed.
//!
//! Included by `tests/it` and by the unit tests of the crate, whose parsers are private. What may
//! not happen is a panic, a hang (nextest ends it) or an allocation out of proportion; what else
//! must hold is said by whoever calls it.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

/// How long inputs are changed, beside replaying them.
const CHANGING: Duration = Duration::from_millis(1200);
/// Most changed inputs: on a fast machine there is no use in more.
const MOST: usize = 20_000;
/// How much the process may grow meanwhile, in bytes.
const GROWTH: u64 = 512 << 20;
/// Bytes that parsers take for something.
const INTERESTING: &[u8] = b"\0\xff\x7f\x80\n\r\t \"\\'{}[](),:;=<>&%/.#@*?-+09azAZ";

/// Runs `parse` on every file of `fixtures/<corpus>`, then on what comes of changing them. Set
/// `HEARTH_TEST_SEED` for other changes.
pub(crate) fn replay(corpus: &str, mut parse: impl FnMut(&[u8])) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fixtures")
        .join(corpus);
    let mut files: Vec<_> = fs::read_dir(&dir)
        .unwrap_or_else(|e| panic!("{}: {e}", dir.display()))
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_file())
        .collect();
    files.sort();
    assert!(files.len() > 2, "{}: no corpus", dir.display());
    let seeds: Vec<Vec<u8>> = files.iter().map(|file| fs::read(file).unwrap()).collect();
    let before = memory();
    for (file, seed) in files.iter().zip(&seeds) {
        let name = file.file_name().unwrap().to_string_lossy();
        run(&name, seed, &mut parse);
    }
    let seed = std::env::var("HEARTH_TEST_SEED").map_or(1, |seed| seed.parse().unwrap());
    let mut random = Random(seed);
    let begun = Instant::now();
    for _ in 0..MOST {
        if begun.elapsed() > CHANGING {
            break;
        }
        let input = random.change(&seeds);
        run("a changed input", &input, &mut parse);
    }
    let grown = memory().saturating_sub(before);
    assert!(grown < GROWTH, "{corpus}: {grown} bytes more memory");
}

fn run(name: &str, input: &[u8], parse: &mut impl FnMut(&[u8])) {
    let shown = OnPanic(name, input);
    parse(input);
    std::mem::forget(shown);
}

/// Shows what a parser did not survive, so that it can be put into the corpus.
struct OnPanic<'i>(&'i str, &'i [u8]);

impl Drop for OnPanic<'_> {
    fn drop(&mut self) {
        let input = &self.1[..self.1.len().min(4096)];
        eprintln!(
            "{} ({} bytes): {}",
            self.0,
            self.1.len(),
            input.escape_ascii()
        );
    }
}

/// The most memory that this process had, in bytes.
fn memory() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().split(' ').next()?.parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

/// A small generator, so that a failure can be repeated.
struct Random(u64);

impl Random {
    fn below(&mut self, most: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as usize) % most.max(1)
    }

    fn one_of<'s>(&mut self, seeds: &'s [Vec<u8>]) -> &'s [u8] {
        let at = self.below(seeds.len());
        &seeds[at]
    }

    fn part(&mut self, len: usize) -> std::ops::Range<usize> {
        let start = self.below(len + 1);
        start..start + self.below((len - start).min(64) + 1)
    }

    /// One of the inputs with one to four changes.
    fn change(&mut self, seeds: &[Vec<u8>]) -> Vec<u8> {
        let mut input = self.one_of(seeds).to_vec();
        for _ in 0..=self.below(4) {
            let at = self.below(input.len() + 1);
            let part = self.part(input.len());
            match self.below(7) {
                0 if at < input.len() => input[at] ^= 1 << self.below(8),
                1 if at < input.len() => {
                    input[at] = INTERESTING[self.below(INTERESTING.len())];
                }
                2 => input.truncate(at),
                3 => drop(input.drain(part)),
                4 => {
                    let twice = input[part].to_vec();
                    input.splice(at..at, twice);
                }
                5 => {
                    let number = [0, 1, u64::MAX, i64::MAX as u64, 1 << 32][self.below(5)];
                    input.splice(at..at, number.to_string().into_bytes());
                }
                _ => {
                    let other = self.one_of(seeds);
                    let part = self.part(other.len());
                    input.splice(at..at, other[part].to_vec());
                }
            }
        }
        input
    }
}
