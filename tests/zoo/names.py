"""Networks of every family of torchvision and timm, by name; those of `QUICK` take about a second each."""

_TIMM_QUICK = """
    resnet10t resnet18d resnetblur18 seresnet18 ecaresnet26t skresnet18 resnest14d test_resnet resnetv2_18
    resnetv2_18d test_byobnet gernet_s repvgg_a0 mobilevit_xxs mobilevitv2_050 regnetx_002 regnety_002 regnetz_005
    densenet121 dla46_c hrnet_w18_small cs3darknet_s cs3darknet_focus_s cspnext_tiny ese_vovnet19b_slim
    inception_next_atto mobilenetv1_100 mobilenetv2_035 mobilenetv3_small_050 tf_mobilenetv3_small_minimal_100
    mobilenetv4_conv_small_035 semnasnet_050 test_efficientnet lcnet_050 rexnet_100
    ghostnet_050 repghostnet_050 hgnetv2_b0 starnet_s050 fasternet_t0 efficientvit_m0 levit_conv_128s
"""
_TORCHVISION_QUICK = """
    resnet18 mobilenet_v3_small mnasnet0_5 shufflenet_v2_x0_5 regnet_y_400mf googlenet quantized_resnet18
    fpn.mobilenet_v2
"""
_TIMM_SLOW = """
    resnet26d resnet50 resnetaa34d seresnext26t_32x4d seresnext26ts ecaresnext26t_32x4d ecaresnet50d_pruned
    eca_resnext26ts gcresnext26ts resnetrs50 skresnext50_32x4d resnest26d res2net50_48w_2s res2net50d res2next50
    legacy_seresnet18 legacy_seresnext26_32x4d resnetv2_50d bat_resnext26ts eca_botnext26ts_256 botnet26t_256
    halonet26t haloregnetz_b lambda_resnet26rpt_256 regnetz_b16 regnetz_c16 mobileone_s0 resnet33ts regnetx_004_tv
    regnety_008_tv regnetv_040 densenetblur121d dpn48b dla34 dla46x_c dla60_res2net hrnet_w18_small_v2 selecsls42
    selecsls60b darknet17 cspresnext50 cspdarknet53 sedarknet21 cs3sedarknet_xdw cspnext_s ese_vovnet19b_dw
    eca_vovnet39b vovnet39a inception_v3 inception_v4 inception_resnet_v2 legacy_xception xception41 xception41p
    nasnetalarge tresnet_m mobilenetv2_110d mobilenetv3_large_075 mobilenetv4_conv_blur_medium
    mobilenetv4_hybrid_medium_075 mobilenet_edgetpu_v2_xs spnasnet_100 tinynet_e mixnet_s efficientnet_b0
    efficientnet_es efficientnetv2_rw_t tf_efficientnetv2_b0 efficientnet_cc_b0_4e gc_efficientnetv2_rw_t fbnetc_100
    fbnetv3_b hardcorenas_a lcnetv2_small rexnetr_100 ghostnetv2_100 ghostnetv3_050 hgnet_tiny starnet_s1
    convmixer_768_32 efficientformer_l1 efficientformerv2_s0 efficientvit_b0 efficientvit_l1 efficientvim_m1
    fastvit_t8 fastvit_mci0 shvit_s1 swiftformer_xs tiny_vit_5m_224 visformer_tiny xcit_nano_12_p16_224 iformer_t
    cpubone_nano nextvit_small repvit_m0_9 mnasnet_small efficientnet_lite0 test_coatnet test_maxvit coatnet_bn_0_rw_224
"""
_TORCHVISION_SLOW = """
    resnet50 densenet121 efficientnet_v2_s inception_v3 mobilenet_v2 mobilenet_v3_large regnet_x_400mf vgg11_bn
    fcn_resnet50 deeplabv3_mobilenet_v3_large lraspp_mobilenet_v3_large fpn.resnet18
"""


def _named(timm: str, torchvision: str) -> tuple[str, ...]:
    return (*(f"timm.{name}" for name in timm.split()), *(f"torchvision.{name}" for name in torchvision.split()))


QUICK = _named(_TIMM_QUICK, _TORCHVISION_QUICK)
SLOW = _named(_TIMM_SLOW, _TORCHVISION_SLOW)

_LARGER = {
    96: "selecsls42 selecsls60b dla46x_c mobilenetv4_conv_blur_medium inception_v4 inception_resnet_v2",
    128: "inception_v3 efficientvim_m1 efficientvit_m0 ghostnetv3_050",
    224: "haloregnetz_b efficientformer_l1",
    256: "bat_resnext26ts halonet26t",
}
LARGER = {f"timm.{name}": px for px, names in _LARGER.items() for name in names.split()}
LARGER["torchvision.inception_v3"] = 128
"""Pixels of those that need more than 64."""

_AS_THEY_COME = """
    efficientvit_m0 efficientvit_l1 levit_conv_128s repvit_m0_9 shvit_s1 iformer_t rexnet_100 rexnetr_100 ghostnetv2_100
    mobilenetv4_hybrid_medium_075
"""
AS_THEY_COME = _named(_AS_THEY_COME, "")
"""Those whose rounding grows where every channel is open: with attention, or with batch norms of few pixels."""
