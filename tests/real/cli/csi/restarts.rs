//! Volumes whose server ends.

use super::*;

#[test]
fn volumes_outlive_their_server_in_a_keeper() {
    let web = Web::slow("2m");
    let model = web.model("m", 8, 1);
    let mut csi = Csi::on(Bed::new(), true);
    let target = csi.publish("v", &model);
    csi.publish("w", &model);
    let shard = "model-00001-of-00001.safetensors";
    // A file that was opened before goes on being read after, and is right.
    let script = "
import sys
with open(sys.argv[1], 'rb', buffering=0) as f, open(sys.argv[2], 'rb') as truth:
    for _ in range(3):
        got = f.read(1 << 20)
        assert got == truth.read(len(got)) and got
        print('read', flush=True)
        input()
    while True:
        got = f.read(1 << 20)
        assert got == truth.read(len(got))
        if not got: break
print('done')
";
    let paths = [
        format!("{target}/{shard}"),
        web.path("m").join(shard).display().to_string(),
    ];
    let mut reader = python(script, &[&paths[0], &paths[1]]);
    reader.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut reader = reader.stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = reader.stdin.take().unwrap();
    let mut word = [0; 5];
    for signal in [Signal::SIGKILL, Signal::SIGTERM] {
        std::io::Read::read_exact(reader.stdout.as_mut().unwrap(), &mut word).unwrap();
        csi.stop(signal);
        assert_eq!(csi.mounts().len(), 3, "{signal}");
        csi.start();
        std::io::Write::write_all(&mut lines, b"\n").unwrap();
    }
    std::io::Write::write_all(&mut lines, b"\n").unwrap();
    drop(lines);
    let read = Done::from("reader".into(), reader.wait_with_output().unwrap());
    assert!(read.ok().ends_with("done\n"));
    assert_same(&target, &web.path("m"));
    wait_for("normal", || {
        !csi.stats("v").volume_condition.unwrap().abnormal
    });

    // Who has all this is small: its memory, not the code of a build for tests.
    let keeper = csi.keeper.as_ref().unwrap().child.as_ref().unwrap().id();
    let own = own_memory(keeper);
    assert!(own < 8 << 10, "{own} KiB");

    // Between publish and unpublish, nobody there.
    csi.stop(Signal::SIGKILL);
    csi.start();
    csi.unpublish("v");
    csi.unpublish("w");
    csi.assert_empty();
    drop(csi.keeper.take());
}

/// Somebody detaches the mount that all volumes of a model are bind mounts of: those that are there go on, and no volume is
/// an empty directory, in this process or the next.
#[test]
fn a_volume_is_never_an_empty_directory() {
    let web = Web::new();
    let model = web.model("m", 4, 1);
    for kept in [true, false] {
        let mut csi = Csi::on(Bed::new(), kept);
        let first = csi.publish("first", &model);
        let detach = || {
            let shared = csi.bed.store().join("run/csi/mounts");
            let mut list = hearth::mount::mounted().unwrap();
            list.retain(|info| info.mountpoint.starts_with(&shared));
            assert_eq!(list.len(), 1);
            umount2(&list[0].mountpoint, MntFlags::MNT_DETACH).unwrap();
        };
        detach();
        let second = csi.publish("second", &model);
        assert_same(&second, &web.path("m"));
        assert_same(&first, &web.path("m"));
        detach();
        csi.stop(Signal::SIGKILL);
        csi.start();
        let third = csi.publish("third", &model);
        assert_same(&third, &web.path("m"));
        // Published again, which the kubelet does, they are whole again, too.
        for volume in ["first", "second"] {
            assert_same(&csi.publish(volume, &model), &web.path("m"));
        }
        for volume in ["first", "second", "third"] {
            csi.unpublish(volume);
        }
        csi.assert_empty();
    }
}

#[test]
fn without_a_keeper_volumes_are_mounted_again() {
    let web = Web::new();
    let model = web.model("m", 2, 1);
    let mut csi = Csi::new();
    let target = csi.publish("v", &model);
    csi.publish("w", &model);
    let asked = csi.asked("whole", &[("source", &model), ("mode", "complete")]);
    csi.try_publish(asked).unwrap();
    for signal in [Signal::SIGKILL, Signal::SIGTERM] {
        csi.stop(signal);
        let dead = connections(&target);
        csi.start();
        wait_for("mounted again", || {
            let stats = csi.stats("v");
            let whole = csi.stats("whole").volume_condition.unwrap();
            !stats.volume_condition.unwrap().abnormal && !whole.abnormal
        });
        let again = connections(&target);
        assert_eq!((dead.len(), again.len()), (1, 1));
        assert_ne!(dead, again);
        assert_same(&target, &web.path("m"));
    }
    csi.stop(Signal::SIGKILL);
    // Meanwhile one pod was removed by force, directory and all.
    let gone = csi.target("w");
    umount2(Path::new(&gone), MntFlags::MNT_DETACH).unwrap();
    fs::remove_dir_all(csi.pods.0.join("w")).unwrap();
    csi.start();
    csi.unpublish("w");
    csi.unpublish("v");
    csi.unpublish("whole");
    csi.assert_empty();

    // A record is lost: what is mounted goes nevertheless.
    csi.publish("v", &model);
    csi.stop(Signal::SIGKILL);
    fs::remove_dir_all(csi.bed.store().join("run/csi/published")).unwrap();
    csi.start();
    csi.unpublish("v");
    csi.assert_empty();
}
