//! The short forms of `tests/survive` and `tests/soak`, which say more about themselves.

use super::*;

/// What `survive` does it on, and how much at least.
const SMALL: &[&str] = &[
    "--mib",
    "12",
    "--small",
    "60",
    "--workers",
    "1",
    "--operations",
    "500",
];

fn script(name: &str, arguments: &[&str]) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests")
        .join(name);
    let mut command = tool("python3", &[path.to_str().unwrap()]);
    command.args(arguments);
    command.args(["--hearth", env!("CARGO_BIN_EXE_hearth")]);
    let out = Done::of(&mut command).ok();
    println!("{out}");
    serde_json::from_str(&out).unwrap()
}

#[test]
fn a_mount_survives_its_server() {
    let said = script(
        "survive",
        &[&["--kills", "8", "--seed", "7"][..], SMALL].concat(),
    );
    assert_eq!(
        (&said["kills"], &said["wrong"], &said["errors"]),
        (&8.into(), &0.into(), &0.into())
    );
    assert!(said["operations"].as_u64().unwrap() > 500, "{said}");
    assert!(
        said["kills_while_arriving"].as_u64().unwrap() >= 2,
        "{said}"
    );
}

/// Killed and upgraded in turns.
#[test]
fn an_agent_is_killed_again_and_again() {
    let many = ["--agent-kills", "4", "--upgrades", "1", "--seed", "7"];
    let said = script("survive", &[&many[..], SMALL].concat());
    assert_eq!(
        (&said["kills"], &said["wrong"], &said["errors"]),
        (&4.into(), &0.into(), &0.into())
    );
    assert!(said["operations"].as_u64().unwrap() > 500, "{said}");
}

#[test]
fn an_agent_is_upgraded_in_place() {
    let said = script(
        "survive",
        &[&["--upgrades", "4", "--seed", "7"][..], SMALL].concat(),
    );
    assert_eq!(
        (&said["upgrades"], &said["wrong"], &said["errors"]),
        (&4.into(), &0.into(), &0.into())
    );
    assert!(said["operations"].as_u64().unwrap() > 500, "{said}");
}

#[test]
fn half_a_minute_of_everything() {
    let said = script("soak", &["0.5", "--seed", "7"]);
    assert_eq!(said["problems"], serde_json::json!([]));
    assert_eq!(said["keeper"], true, "{said}");
    assert!(said["server killed"].as_u64().unwrap() > 0, "{said}");
    assert!(said["operations"].as_u64().unwrap() > 100, "{said}");
}
