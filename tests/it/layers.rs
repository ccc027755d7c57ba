//! The drawing of the house in `ARCHITECTURE.md` is true: a room imports only rooms below it.

use std::{fs, path::Path};

/// Top to bottom; rooms on one line are siblings and never import each other.
const LAYERS: &[&[&str]] = &[
    &["cli"],
    &["daemon"],
    &["config"],
    &["csi", "snapshotter", "mirror", "admin", "kube"],
    &["mount"],
    &["node", "fs"],
    &["fetch"],
    &["image"],
    &["store", "source"],
    &["disk", "tree", "socket"],
    &["reference", "digest", "chunk", "limits"],
];
/// Imported by any room, import none but each other.
const GROUND: &[&str] = &["metrics", "gen", "telemetry"];

fn layer(room: &str) -> Option<usize> {
    LAYERS.iter().position(|rooms| rooms.contains(&room))
}

/// The rooms named after `crate::` in a source text; understands `use crate::{a::…, b::…}`.
fn imports(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    let name = |rest: &str| -> String {
        rest.chars()
            .take_while(|c| c.is_ascii_alphanumeric() || *c == '_')
            .collect()
    };
    for (at, _) in text.match_indices("crate::") {
        let rest = &text[at + "crate::".len()..];
        if !rest.starts_with('{') {
            found.push(name(rest));
            continue;
        }
        let mut depth = 0;
        let mut item_starts = true;
        for (at, c) in rest.char_indices() {
            match c {
                '{' => {
                    depth += 1;
                    item_starts = depth == 1;
                }
                '}' => {
                    depth -= 1;
                    if depth == 0 {
                        break;
                    }
                }
                ',' if depth == 1 => item_starts = true,
                c if depth == 1 && item_starts && c.is_ascii_alphabetic() => {
                    found.push(name(&rest[at..]));
                    item_starts = false;
                }
                _ => {}
            }
        }
    }
    found
}

fn source_files(dir: &Path, found: &mut Vec<(String, String)>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            source_files(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            let relative = path.strip_prefix(Path::new(env!("CARGO_MANIFEST_DIR")).join("src"));
            let name = relative.unwrap().to_str().unwrap().to_owned();
            found.push((name, fs::read_to_string(&path).unwrap()));
        }
    }
}

#[test]
fn rooms_import_only_rooms_below() {
    let mut files = Vec::new();
    source_files(
        &Path::new(env!("CARGO_MANIFEST_DIR")).join("src"),
        &mut files,
    );
    assert!(files.len() > 30, "the sources were found");
    let mut wrong = Vec::new();
    for (file, text) in &files {
        let room = file.split(['/', '.']).next().unwrap();
        if matches!(room, "lib" | "main") {
            continue;
        }
        let is_ground = GROUND.contains(&room);
        let Some(own) = layer(room).or(is_ground.then_some(usize::MAX)) else {
            wrong.push(format!("{file}: room {room} has no place in the drawing"));
            continue;
        };
        // Tests inside a room may use what is above.
        let code = text.split("#[cfg(test)]\nmod tests").next().unwrap();
        for import in imports(code) {
            if import == room || GROUND.contains(&import.as_str()) {
                continue;
            }
            match layer(&import) {
                Some(other) if other > own => {}
                Some(_) => wrong.push(format!("{file} imports {import}, which is not below")),
                None => {}
            }
        }
        if room != "mount" && code.contains("fuser::") {
            wrong.push(format!("{file} imports fuser, which is for mount only"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn files_stay_small() {
    let mut files = Vec::new();
    source_files(
        &Path::new(env!("CARGO_MANIFEST_DIR")).join("src"),
        &mut files,
    );
    for (file, text) in files {
        if file.starts_with("gen/") {
            continue; // nobody reads it
        }
        let code = text.split("#[cfg(test)]\nmod tests").next().unwrap();
        let lines = code.lines().count();
        assert!(
            lines <= 700,
            "{file} has {lines} lines: is it still one thing?"
        );
    }
}

#[test]
fn the_parser_of_this_test_works() {
    let text =
        "use crate::{\n    a::{x, y},\n    b::Z,\n    c,\n};\nuse crate::d::E; crate::f::g()";
    let mut found = imports(text);
    found.sort();
    assert_eq!(found, ["a", "b", "c", "d", "f"]);
}
