//! How results, progress and errors look.

use std::{
    borrow::Cow,
    io::{self, IsTerminal as _, Write as _},
    sync::OnceLock,
    time::{Duration, Instant},
};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::{
    mount::MountError,
    node::{NodeError, Progress},
    snapshotter::SnapshotError,
    store::{ByteSize, StoreError},
};

/// Rows of files under way that are shown.
const MAX_BARS: usize = 8;
/// How long nothing must have arrived before that is said.
const SILENCE: Duration = Duration::from_secs(5);
/// How often a plain line is printed where there is no terminal.
const PLAIN_EVERY: Duration = Duration::from_secs(5);

/// The bars of this process, so that log lines do not tear them.
fn bars() -> &'static MultiProgress {
    static BARS: OnceLock<MultiProgress> = OnceLock::new();
    BARS.get_or_init(MultiProgress::new)
}

/// Writes log lines to stderr, above the bars. A line that cannot be written is lost: the log of a
/// mount may lie on a disk that is full, which is no reason for anything to stop.
pub(super) struct LogWriter;

impl io::Write for LogWriter {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let _ = bars().suspend(|| io::stderr().write_all(data));
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        let _ = io::stderr().flush();
        Ok(())
    }
}

impl tracing_subscriber::fmt::MakeWriter<'_> for LogWriter {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        Self
    }
}

/// Prints a line to stdout. Names in it may be those of strangers.
pub(super) fn line(text: impl AsRef<str>) -> io::Result<()> {
    self::text(plain(text.as_ref(), ""))
}

/// Prints text of our own to stdout, as it is.
pub(super) fn text(text: impl AsRef<str>) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{}", text.as_ref())
}

/// Text without control characters, but those in `but`: a terminal obeys them.
fn plain<'t>(text: &'t str, but: &str) -> Cow<'t, str> {
    let is_control = |c: char| c.is_control() && !but.contains(c);
    if !text.contains(is_control) {
        return text.into();
    }
    let mut shown = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        match is_control(c) {
            true => shown.extend(c.escape_default()),
            false => shown.push(c),
        }
    }
    shown.into()
}

/// Prints a value as JSON to stdout.
pub(super) fn json(value: &impl serde::Serialize) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    serde_json::to_writer_pretty(&mut out, value).map_err(io::Error::from)?;
    writeln!(out)?;
    Ok(())
}

/// Says something on stderr.
pub(super) fn note(text: &str) {
    // Who cannot be told goes on: the log may lie on a disk that is full.
    let text = plain(text, "\n");
    let _ = bars().suspend(|| writeln!(io::stderr(), "{text}"));
}

/// `error:`, its causes, and a hint.
pub(super) fn error(error: &anyhow::Error) {
    note(&describe(error));
}

/// The text of [`error`].
pub(super) fn describe(error: &anyhow::Error) -> String {
    let mut text = format!("error: {error}");
    for cause in error.chain().skip(1) {
        let cause = cause.to_string();
        // Some messages end with their cause already.
        if !text.ends_with(&cause) {
            text.push_str(&format!("\n  caused by: {cause}"));
        }
    }
    if let Some(hint) = error.chain().find_map(hint) {
        text.push_str(&format!("\nhint: {hint}"));
    }
    text
}

/// An error and its causes in one line.
pub(super) fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let all = anyhow::Chain::new(error).map(ToString::to_string);
    all.collect::<Vec<_>>().join(": ")
}

/// An error with what to try.
pub(super) fn hinted(message: impl Into<String>, hint: impl Into<String>) -> anyhow::Error {
    Hinted(message.into(), hint.into()).into()
}

#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Hinted(String, String);

fn hint(error: &(dyn std::error::Error + 'static)) -> Option<String> {
    if let Some(error) = error.downcast_ref::<NodeError>() {
        return error.hint();
    }
    if let Some(Hinted(_, hint)) = error.downcast_ref() {
        return Some(hint.clone());
    }
    if let Some(error) = error.downcast_ref::<StoreError>() {
        return error.hint().map(str::to_owned);
    }
    if let Some(error) = error.downcast_ref::<SnapshotError>() {
        return error.hint().map(str::to_owned);
    }
    let error = error.downcast_ref::<MountError>()?;
    error.hint().map(str::to_owned)
}

/// Bytes for people.
pub(super) fn size(bytes: u64) -> String {
    ByteSize(bytes).to_string()
}

/// `part` of `whole` in per cent, rounded down, so that 100 % means all.
pub(super) fn percent(part: u64, whole: u64) -> u64 {
    if whole == 0 {
        return 100;
    }
    (u128::from(part) * 100 / u128::from(whole)) as u64
}

/// Rows in aligned columns; the first row is the heading.
pub(super) fn table(rows: &[Vec<String>]) -> io::Result<()> {
    let rows: Vec<Vec<_>> = (rows.iter())
        .map(|row| row.iter().map(|cell| plain(cell, "")).collect())
        .collect();
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns)
        .map(|c| {
            rows.iter()
                .filter_map(|r| r.get(c))
                .map(|s| s.chars().count())
                .max()
                .unwrap_or(0)
        })
        .collect();
    for row in &rows {
        let mut text = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            text.push_str(&format!("{cell:<width$}  "));
        }
        line(text.trim_end())?;
    }
    Ok(())
}

/// Shows the progress of one warm until `done`, then leaves nothing behind.
pub(super) async fn show<T>(name: &str, progress: &Progress, done: impl Future<Output = T>) -> T {
    tokio::pin!(done);
    let mut shown = Shown::new(name);
    let mut tick = tokio::time::interval(Duration::from_millis(100));
    loop {
        tokio::select! {
            done = &mut done => {
                shown.clear();
                return done;
            }
            _ = tick.tick() => shown.update(progress),
        }
    }
}

struct Shown {
    name: String,
    terminal: bool,
    total: Option<ProgressBar>,
    files: Vec<ProgressBar>,
    last_plain: Instant,
    first_present: Option<(Instant, u64)>,
    /// That the origin fails has been said.
    told: bool,
}

impl Shown {
    fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            terminal: io::stderr().is_terminal(),
            total: None,
            files: Vec::new(),
            last_plain: Instant::now(),
            first_present: None,
            told: false,
        }
    }

    fn update(&mut self, progress: &Progress) {
        let Some(now) = progress.snapshot() else {
            return;
        };
        match &now.trouble {
            None => self.told = false,
            Some(trouble) if !self.told && trouble.since.elapsed() >= SILENCE => {
                self.told = true;
                let left = trouble.until.saturating_duration_since(Instant::now());
                note(&format!(
                    "waiting: {}; trying for another {} s",
                    trouble.error,
                    left.as_secs()
                ));
            }
            Some(_) => {}
        }
        let (since, base) = *self
            .first_present
            .get_or_insert((Instant::now(), now.present_bytes));
        if !self.terminal {
            if self.last_plain.elapsed() >= PLAIN_EVERY {
                self.last_plain = Instant::now();
                let rate = now.present_bytes.saturating_sub(base) as f64
                    / since.elapsed().as_secs_f64().max(0.001);
                // At a standstill nobody knows.
                let left = match rate < 1.0 {
                    true => String::new(),
                    false => {
                        let left = now.total_bytes.saturating_sub(now.present_bytes) as f64;
                        format!(", {:.0} s left", left / rate)
                    }
                };
                note(&format!(
                    "{}: {} of {} ({} %), {}/s, {} of {} files{left}",
                    self.name,
                    size(now.present_bytes),
                    size(now.total_bytes),
                    percent(now.present_bytes, now.total_bytes),
                    size(rate as u64),
                    now.done_files,
                    now.total_files,
                ));
            }
            return;
        }
        let total = self.total.get_or_insert_with(|| {
            let style =
                "{wide_msg} {prefix} {bar:10} {bytes:>10}/{total_bytes} {bytes_per_sec:>12} ETA {eta:>3}";
            let bar = bar(style, &self.name, now.total_bytes).with_position(now.present_bytes);
            bar.reset_elapsed();
            bars().add(bar)
        });
        total.set_prefix(format!("{}/{} files", now.done_files, now.total_files));
        total.set_length(now.total_bytes);
        total.set_position(now.present_bytes);
        let rows = now.active.len().min(MAX_BARS);
        for file in now.active.iter().take(rows).skip(self.files.len()) {
            let style = "  {wide_msg} {bar:16} {bytes:>10}/{total_bytes:10}";
            let bar = bar(style, &file.name, file.size);
            self.files.push(bars().add(bar));
        }
        for gone in self.files.drain(rows..) {
            bars().remove(&gone);
        }
        for (bar, file) in self.files.iter().zip(&now.active) {
            bar.set_length(file.size);
            bar.set_position(file.present);
            bar.set_message(plain(&file.name, "").into_owned());
        }
    }

    fn clear(&mut self) {
        for bar in self.files.drain(..).chain(self.total.take()) {
            bar.finish_and_clear();
            bars().remove(&bar);
        }
    }
}

/// A bar that is not shown yet: one that is added is drawn as it is.
fn bar(style: &str, message: &str, total: u64) -> ProgressBar {
    let style = ProgressStyle::with_template(style)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("=> ");
    let target = indicatif::ProgressDrawTarget::hidden();
    ProgressBar::with_draw_target(Some(total), target)
        .with_style(style)
        .with_message(plain(message, "").into_owned())
}

/// A bar of bytes on stderr.
pub(super) fn byte_bar(message: &str, total: u64) -> ProgressBar {
    let style = "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} ETA {eta}";
    bars().add(bar(style, message, total))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terminals_are_told_nothing_by_strangers() {
        assert_eq!(plain("modèle-\u{4e2d}.bin", ""), "modèle-\u{4e2d}.bin");
        let name = "a\x1b]0;x\x07\r\n\u{9b}2Jb\x7f\t";
        let shown = r"a\u{1b}]0;x\u{7}\r\n\u{9b}2Jb\u{7f}\t";
        assert_eq!(plain(name, ""), shown);
        assert_eq!(plain("one\n two\r", "\n"), "one\n two\\r");
    }
}
